"""LoRA adapters: reading them and merging them into weights."""
