"""The models that are measured, and the matrix products in them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["DEEP_5M", "MAMBA_130M", "QUICK", "SMALL", "WIDE_5M", "Shape"]


@dataclass(frozen=True)
class Shape:
    """A Mamba's sizes, named as in Transformers' config."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    state_size: int = 16
    expand: int = 2
    conv_kernel: int = 4
    tie_word_embeddings: bool = True

    @property
    def inner(self) -> int:
        """e, the width inside a layer."""
        return self.expand * self.hidden_size

    @property
    def rank(self) -> int:
        """r, the rank of the step size."""
        return math.ceil(self.hidden_size / 16)

    def as_config(self) -> dict[str, Any]:
        """The fields for `MambaConfig`, AnyMamba's or Transformers'."""
        return asdict(self)


MAMBA_130M = Shape(vocab_size=50280, hidden_size=768, num_hidden_layers=24)
# About five million weights each, nearly all of them in layers.
DEEP_5M = Shape(vocab_size=256, hidden_size=256, num_hidden_layers=12)
WIDE_5M = Shape(vocab_size=256, hidden_size=512, num_hidden_layers=3)
SMALL = Shape(vocab_size=256, hidden_size=64, num_hidden_layers=2)
QUICK = Shape(vocab_size=64, hidden_size=32, num_hidden_layers=2)
