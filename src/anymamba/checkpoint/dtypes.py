"""bfloat16 for numpy, which does not have it: the bits in uint16, to and from float32.

A bfloat16 is the upper half of a float32. Widening is exact; narrowing rounds to the nearest, and
of two equally near to the one whose last bit is zero, as the processors' instructions do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["to_bfloat16", "to_float32"]

_BLOCK = 1 << 20  # numbers at a time, so that what lies between costs little memory


def to_bfloat16(values: NDArray[np.floating[Any]]) -> NDArray[np.uint16]:
    """Round numbers to bfloat16.

    Args:
        values: float32 or float16, of any shape.

    Returns:
        The bits, in the same shape. What is too large becomes infinite, and NaN stays NaN.

    Example:
        >>> [hex(bits) for bits in to_bfloat16(np.array([1.0, -2.0, np.inf], np.float32))]
        ['0x3f80', '0xc000', '0x7f80']
    """
    flat = np.ascontiguousarray(values).reshape(-1)
    narrow = np.empty(flat.shape, np.uint16)
    for start in range(0, flat.size, _BLOCK):
        part = flat[start : start + _BLOCK].astype(np.float32, copy=False)
        bits = part.view(np.uint32)
        last_kept = (bits >> 16) & 1
        rounded = (bits + (0x7FFF + last_kept)) >> 16
        # Rounding could carry a NaN over to infinity or to zero: set its quiet bit instead.
        narrow[start : start + _BLOCK] = np.where(np.isnan(part), bits >> 16 | 0x40, rounded)
    return narrow.reshape(values.shape)


def to_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Widen bfloat16 to float32, which is exact.

    Args:
        bits: bfloat16 as its bits, of any shape.

    Returns:
        The numbers, in the same shape.

    Example:
        >>> to_float32(np.array([0x3F80, 0xC000], np.uint16)).tolist()
        [1.0, -2.0]
    """
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)
