"""Training a model from scratch on texts."""

from anymamba.training.pretrain.run import train

__all__ = ["train"]
