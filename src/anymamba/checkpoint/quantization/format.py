"""The format of a weight in 8 or 4 bits.

A weight (n, k) is cut along k into groups of 32, 64 or 128. Each group keeps unsigned whole
numbers q and a scale, and with an offset also a minimum, both in bfloat16:

    symmetric     weight = scale * (q - zero)      zero is 128 at 8 bits, 8 at 4 bits
    with offset   weight = scale * q + minimum

At 8 bits q takes a byte. At 4 bits a byte holds two: byte i of a group has number i in its low
half and number i + group / 2 in its high half, so that one mask and one shift unpack a register.

    n  rows of a weight, outputs      k  columns, inputs      g  groups of a row, k / group
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from anymamba.checkpoint.quantized_folder import GROUPS
from anymamba.errors import ConfigError, InputError

Bits = Literal[8, 4]

# Beyond this a difference of two weights could leave float32; no trained weight comes near it.
_LARGEST = np.float32(2.0**120)
_BLOCK = 1 << 17  # weights that are worked on at a time: they stay in the processor's cache


@dataclass(frozen=True)
class QuantizedArray:
    """A weight (n, k) in whole numbers with a scale a group.

    Args:
        q: uint8, (n, k) at 8 bits, (n, k / 2) at 4 bits, two numbers a byte.
        scales: bfloat16 as its bits in uint16, (n, k / group).
        minima: the same, or None where zero lies in the middle.
        bits: 8 or 4.
        group: how many weights of a row share a scale.
        shape: (n, k).

    Raises:
        InputError: an array does not have the type or shape that the others imply.

    Example:
        >>> q, scales = np.zeros((2, 32), np.uint8), np.zeros((2, 2), np.uint16)
        >>> weight = QuantizedArray(q, scales, None, bits=4, group=32, shape=(2, 64))
        >>> weight.symmetric, weight.nbytes
        (True, 72)
    """

    q: NDArray[np.uint8]
    scales: NDArray[np.uint16]
    minima: NDArray[np.uint16] | None
    bits: Bits
    group: int
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        n, k = self.shape
        check_format(self.bits, self.group, k)
        per_group = (n, k // self.group)
        expected: list[tuple[str, NDArray[Any], type, tuple[int, int]]] = [
            ("q", self.q, np.uint8, (n, k * self.bits // 8)),
            ("scales", self.scales, np.uint16, per_group),
        ]
        if self.minima is not None:
            expected.append(("minima", self.minima, np.uint16, per_group))
        for name, array, dtype, shape in expected:
            if array.dtype != dtype or array.shape != shape:
                raise InputError(
                    f"{name} of a weight {self.shape} in {self.bits} bits, groups of {self.group}, "
                    f"must be {dtype.__name__} {shape}, got {array.dtype} {array.shape}"
                )

    @property
    def symmetric(self) -> bool:
        """Whether zero lies in the middle of the numbers, and there are no minima."""
        return self.minima is None

    @property
    def nbytes(self) -> int:
        """The bytes of all that is kept."""
        minima = 0 if self.minima is None else self.minima.nbytes
        return self.q.nbytes + self.scales.nbytes + minima

    def arrays(self) -> dict[str, Any]:
        """The arrays by the names that the native core expects."""
        return {"q": self.q, "scales": self.scales, "minima": self.minima}


Tensor: TypeAlias = NDArray[Any] | QuantizedArray
"""A weight as it is kept: an array (bfloat16 as its bits in uint16), or a quantized matrix."""


def check_format(bits: int, group: int, k: int, name: str = "the weight") -> None:
    """Check that rows of k weights can be kept in these groups. Arguments are as in `quantize`.

    Raises:
        ConfigError: no such bits or groups exist.
        InputError: the group does not divide k.

    Example:
        >>> check_format(4, 128, 768)
        >>> check_format(4, 32, 48, "dt_proj")
        Traceback (most recent call last):
            ...
        anymamba.errors.InputError: dt_proj has rows of 48, which groups of 32 do not divide; \
keep it in bfloat16
    """
    if bits not in (8, 4):
        raise ConfigError(f"bits must be 8 or 4, got {bits!r}")
    if group not in GROUPS:
        raise ConfigError(f"group must be one of {', '.join(map(str, GROUPS))}, got {group!r}")
    if k % group or k == 0:
        raise InputError(
            f"{name} has rows of {k}, which groups of {group} do not divide; keep it in bfloat16"
        )


def pack(q: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Lay whole numbers (n, g, group) out as they are stored: (n, k) at 8 bits, (n, k / 2) at 4.

    Example:
        >>> pack(np.arange(4, dtype=np.uint8).reshape(1, 1, 4), bits=4).tolist()  # 0x20, 0x31
        [[32, 49]]
    """
    if bits == 4:
        half = q.shape[2] // 2
        q = q[..., :half] | (q[..., half:] << np.uint8(4))
    return q.reshape(q.shape[0], q.shape[1] * q.shape[2])


def unpack(stored: NDArray[np.uint8], bits: int, group: int) -> NDArray[np.uint8]:
    """Take out the whole numbers (n, g, group) that `pack` laid out.

    Example:
        >>> unpack(np.array([[0x20, 0x31]], np.uint8), bits=4, group=4).tolist()
        [[[0, 1, 2, 3]]]
    """
    n = stored.shape[0]
    if bits == 8:
        return stored.reshape(n, stored.shape[1] // group, group)
    halves = stored.reshape(n, 2 * stored.shape[1] // group, group // 2)
    return np.concatenate([halves & np.uint8(15), halves >> np.uint8(4)], axis=2)


def check_weight(weight_nk: NDArray[Any], bits: int, group: int, name: str) -> None:
    """Check that a weight can be quantized. Arguments are as in `quantize`.

    Raises:
        ConfigError: there are no such bits or groups.
        InputError: the weight is no float32 matrix, its rows are no multiple of the group, or it
            holds NaN, infinity or a number beyond 2^120.

    Example:
        >>> check_weight(np.full((1, 32), np.nan, np.float32), 4, 32, "out")
        Traceback (most recent call last):
            ...
        anymamba.errors.InputError: out holds NaN, infinity or numbers beyond 2^120 (in 1 of \
1 rows), which no scale fits; the file may be broken
    """
    if weight_nk.ndim != 2 or weight_nk.dtype != np.float32:
        raise InputError(
            f"{name} must be a float32 matrix, got {weight_nk.dtype} {weight_nk.shape}"
        )
    check_format(bits, group, weight_nk.shape[1], name)
    n, k = weight_nk.shape
    # NaN is not below anything.
    wrong = sum(
        int((~(np.abs(weight_nk[rows]).max(axis=1) <= _LARGEST)).sum()) for rows in row_blocks(n, k)
    )
    if wrong:
        raise InputError(
            f"{name} holds NaN, infinity or numbers beyond 2^120 (in {wrong} of {n} rows), which "
            "no scale fits; the file may be broken"
        )


def row_blocks(n: int, k: int) -> Iterator[slice]:
    """Cut n rows of k weights into slices that the processor's cache holds.

    Example:
        >>> list(row_blocks(3, 1 << 16))
        [slice(0, 2, None), slice(2, 4, None)]
    """
    step = max(1, _BLOCK // max(k, 1))
    for start in range(0, n, step):
        yield slice(start, start + step)
