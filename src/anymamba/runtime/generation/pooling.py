"""From what a model makes of a text's tokens to one vector for the text."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from anymamba.errors import InputError

POOLING = ("mean", "last")


class Pooling:
    """Takes hidden states as the text is read, and makes one vector of them.

    The mean is summed in float64, token by token: where the text was cut does not show in it.

    Args:
        method: "mean" over the text's tokens, or the "last" one's.
        normalize: whether to bring the vector to length 1, so that products of two are cosines.

    Raises:
        InputError: there is no such method.

    Example:
        >>> pooling = Pooling("mean", normalize=False)
        >>> pooling.add(np.array([[1.0, 2.0], [3.0, 2.0]], np.float32))
        >>> pooling.add(np.array([[2.0, 5.0]], np.float32))
        >>> pooling.vector().tolist()
        [2.0, 3.0]
    """

    def __init__(self, method: str = "mean", normalize: bool = True) -> None:
        if method not in POOLING:
            raise InputError(f"pooling is {method!r}, expected {' or '.join(map(repr, POOLING))}")
        self._is_mean = method == "mean"
        self._normalize = normalize
        self._sum_1d: NDArray[np.float64] | None = None
        self._count = 0

    def add(self, hidden_ld: NDArray[np.float32]) -> None:
        """Take in the next tokens' hidden states (l, d)."""
        if not self._is_mean:
            self._sum_1d, self._count = hidden_ld[-1:].astype(np.float64), 1
            return
        before = hidden_ld[:0] if self._sum_1d is None else self._sum_1d
        wide_ld = np.concatenate([before, hidden_ld], dtype=np.float64)
        self._sum_1d = np.add.reduce(wide_ld, axis=0, keepdims=True)  # row after row
        self._count += len(hidden_ld)

    def vector(self) -> NDArray[np.float32]:
        """The text's vector (d,), once it is read.

        Raises:
            InputError: nothing was read.
        """
        if self._sum_1d is None:
            raise InputError("there is no text to make a vector of: give one token or more")
        mean_d: NDArray[np.float64] = self._sum_1d[0] / self._count
        if self._normalize:
            mean_d /= max(float(np.linalg.norm(mean_d)), 1e-12)
        return mean_d.astype(np.float32)
