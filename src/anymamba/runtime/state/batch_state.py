"""What a model remembers of some texts that it reads side by side, as the native core keeps it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anymamba.renamed import old_names


@dataclass
class BatchState:
    """The memory of b texts: two blocks whose size no text changes.

    Args:
        conv: (n_layer, b, e, k) float32, the last k inputs of each layer's convolution.
        ssm: (n_layer, b, e, n) float32, the state of each channel.
        counts: (b,) int64, how many tokens of each text were read.
        logits: (b, v) float32, what the model says of each next token; None before the first.
    """

    conv: NDArray[np.float32]
    ssm: NDArray[np.float32]
    counts: NDArray[np.int64]
    logits: NDArray[np.float32] | None = None

    @classmethod
    def empty(cls, sizes: Mapping[str, str | int], rows: int) -> BatchState:
        """The memory of texts of which nothing was read, by the `state_identity` of the model."""
        e = sizes["intermediate_size"]
        shape = (int(sizes["num_hidden_layers"]), rows, int(e))
        return cls(
            conv=np.zeros((*shape, int(sizes["conv_kernel"])), np.float32),
            ssm=np.zeros((*shape, int(sizes["state_size"])), np.float32),
            counts=np.zeros(rows, np.int64),
        )

    @property
    def rows(self) -> int:
        """b, how many texts these are."""
        return self.counts.size

    def take(self, rows: Sequence[int]) -> BatchState:
        """Copies of some rows, of each as often as it is named."""
        return BatchState(
            np.take(self.conv, rows, axis=1),
            np.take(self.ssm, rows, axis=1),
            np.take(self.counts, rows),
            None if self.logits is None else np.take(self.logits, rows, axis=0),
        )


__getattr__ = old_names(__name__)
