"""Padding and packing of texts in a batch, as segments that do not see each other."""

from anymamba.modeling.packing.kept_positions import at_kept, check_kept, targets_of
from anymamba.modeling.packing.packing import Layout, check_mask, next_tokens, pack_batch
from anymamba.renamed import old_names

__all__ = [
    "Layout",
    "at_kept",
    "check_kept",
    "check_mask",
    "next_tokens",
    "pack_batch",
    "targets_of",
]

__getattr__ = old_names(__name__)
