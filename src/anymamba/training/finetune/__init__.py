"""Training a model further, or an adapter of it."""

from anymamba.training.finetune.run import FinetuneSettings, finetune

__all__ = ["FinetuneSettings", "finetune"]
