"""Training a model further, or an adapter of it."""

from anymamba.renamed import old_names
from anymamba.training.finetune.run import FinetuneSettings, finetune

__all__ = ["FinetuneSettings", "finetune"]

__getattr__ = old_names(__name__)
