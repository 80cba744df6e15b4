"""Linear layers and embeddings split over several processes: names to import, none to use.

Programs import them beside the layers, and use them only with a process group.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from anymamba.errors import NotIncludedError

__all__ = [
    "ColumnParallelEmbedding",
    "ColumnParallelLinear",
    "ParallelEmbeddings",
    "RowParallelLinear",
    "VocabParallelEmbedding",
]


class _Split(nn.Module):
    """A layer that only the original has.

    Raises:
        NotIncludedError: it is constructed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotIncludedError(
            f"{type(self).__name__} splits a layer over several processes, which AnyMamba's "
            "drop-in does not: leave process_group out, or train with PyTorch's data parallelism"
        )


class ColumnParallelEmbedding(_Split):
    """An embedding split by columns."""


class ColumnParallelLinear(_Split):
    """A linear layer split by output channels."""


class ParallelEmbeddings(_Split):
    """The embeddings of tokens and positions, split."""


class RowParallelLinear(_Split):
    """A linear layer split by input channels."""


class VocabParallelEmbedding(_Split):
    """An embedding split by tokens."""
