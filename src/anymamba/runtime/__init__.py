"""Running models without PyTorch: engine, state, sampling, quantization, tokenizer."""
