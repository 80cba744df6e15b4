"""What a model remembers of some texts, one a row, as the native core keeps it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anymamba.checkpoint.state_file import state_shapes
from anymamba.renamed import old_names


@dataclass
class BatchState:
    """The memory of b texts: two blocks whose size no text changes.

    Any rows may advance while the others stay as they are, so that a text that comes or goes costs
    the others nothing.

    Args:
        conv: (n_layer, b, e, k) float32, the last k inputs of each layer's convolution.
        ssm: (n_layer, b, e, n) float32, the state of each channel. `state_shapes` has the shapes of
            other architectures.
        counts: (b,) int64, how many tokens of each text were read.
        logits: for each text (v,) float32, what the model says of the next token, never written to
            again; None before the first.
    """

    conv: NDArray[np.float32]
    ssm: NDArray[np.float32]
    counts: NDArray[np.int64]
    logits: list[NDArray[np.float32] | None]

    @classmethod
    def empty(cls, sizes: Mapping[str, str | int], rows: int) -> BatchState:
        """The memory of texts of which nothing was read, by the `state_identity` of the model."""
        shape, (window, state) = (int(sizes["num_hidden_layers"]), rows), state_shapes(sizes)
        return cls(
            conv=np.zeros((*shape, *window), np.float32),
            ssm=np.zeros((*shape, *state), np.float32),
            counts=np.zeros(rows, np.int64),
            logits=[None] * rows,
        )

    @property
    def rows(self) -> int:
        """b, how many texts these are."""
        return self.counts.size

    def take(self, rows: Sequence[int]) -> BatchState:
        """Copies of some rows, of each as often as it is named.

        Logits are often a row of an array for many texts, all of which they would keep in memory.
        """
        logits = [self.logits[row] for row in rows]
        return BatchState(
            np.take(self.conv, rows, axis=1),
            np.take(self.ssm, rows, axis=1),
            np.take(self.counts, rows),
            [None if logits_v is None else logits_v.copy() for logits_v in logits],
        )


__getattr__ = old_names(__name__)
