"""Rounding a weight to 8 or 4 bits, and the arithmetic that every kernel is held to.

Scales are rounded to bfloat16 before the whole numbers q are computed with them: q makes up for
the rounding. A symmetric 4-bit scale may be negative. There are numbers from -8 to 7, and the
weight of the largest magnitude gets -8, whichever sign it has: the others then lie an eighth finer.

The product with such a weight rounds the other side too: each row of activations is cut into the
same groups, and each group becomes signed bytes and a float32 scale. Products of whole numbers
are exact, and only the sum over the groups rounds.

    n  rows of a weight, outputs      k  columns, inputs      g  groups of a row, k / group
    m  rows of activations
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from anymamba.checkpoint.dtypes import to_bfloat16, to_float32
from anymamba.checkpoint.quantization.format import (
    Bits,
    QuantizedArray,
    check_format,
    check_weight,
    pack,
    row_blocks,
    unpack,
)
from anymamba.errors import ConfigError, InputError

# A scale or minimum below this counts as zero: what it stands for is lost beside any other weight,
# and no kernel meets numbers that are not normal.
_SMALLEST = np.float32(2.0**-100)


def quantize(
    weight_nk: NDArray[np.float32],
    bits: Bits,
    group: int = 128,
    symmetric: bool = True,
    clip: float | NDArray[np.float32] | None = None,
    name: str = "the weight",
) -> QuantizedArray:
    """Round a weight to whole numbers, each group by itself, to the nearest.

    Args:
        weight_nk: (n, k), float32.
        bits: 8 or 4.
        group: how many weights of a row share a scale, 32, 64 or 128; divides k.
        symmetric: whether zero lies in the middle; else each group has a minimum.
        clip: which share of its range a group keeps, above 0 and at most 1: one for all, or
            (n, k / group). What lies outside becomes the nearest number that there is.
            `anymamba.runtime.convert.calibration.search_clip` finds good ones.
        name: what is quantized, for messages.

    Returns:
        What `dequantize` and the kernels read.

    Raises:
        ConfigError: there are no such bits, groups or clip.
        InputError: the weight is no float32 matrix, its rows are no multiple of the group, or it
            holds NaN, infinity or a number beyond 2^120.

    Example:
        >>> weight = np.linspace(-1, 1, 64, dtype=np.float32)[None]
        >>> kept = dequantize(quantize(weight, bits=8, group=64))
        >>> bool(abs(kept - weight).max() < 1 / 127)
        True
    """
    check_weight(weight_nk, bits, group, name)
    n, k = weight_nk.shape
    clip_ng = _checked_clip(clip, (n, k // group))
    q = np.empty((n, k * bits // 8), np.uint8)
    scales = np.empty((n, k // group), np.uint16)
    minima = None if symmetric else np.empty_like(scales)
    for rows in row_blocks(n, k):
        part = weight_nk[rows].reshape(-1, k // group, group)
        scale, minimum = scales_of(*ranges(part), bits, symmetric, clip_ng[rows])
        q[rows] = pack(round_to(part, scale, minimum, bits), bits)
        scales[rows] = to_bfloat16(scale)
        if minima is not None and minimum is not None:
            minima[rows] = to_bfloat16(minimum)
    return QuantizedArray(q, scales, minima, bits, group, (n, k))


def dequantize(weight: QuantizedArray) -> NDArray[np.float32]:
    """Compute the weights (n, k) that the whole numbers stand for, in float32.

    Example:
        >>> dequantize(quantize(np.full((1, 32), 0.5, np.float32), bits=4, group=32))[0, :3]
        array([0.5, 0.5, 0.5], dtype=float32)
    """
    n, k = weight.shape
    values = np.empty((n, k // weight.group, weight.group), np.float32)
    for rows in row_blocks(n, k):
        minimum = None if weight.minima is None else to_float32(weight.minima[rows])
        q = unpack(weight.q[rows], weight.bits, weight.group)
        values[rows] = values_of(q, to_float32(weight.scales[rows]), minimum, weight.bits)
    return values.reshape(n, k)


def quantize_rows(
    x_mk: NDArray[np.float32], group: int
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round activations (m, k) as the kernels do: to signed bytes, with a scale a row and group.

    Returns:
        q (m, k) from -127 to 127, and scales (m, k / group): x is about scale * q. Of a group
        that holds NaN or infinity the scale is NaN, so that its products are.

    Raises:
        ConfigError: there are no such groups.
        InputError: the group does not divide k.

    Example:
        >>> q, scales = quantize_rows(np.array([[-1.0, 0.5] * 16], np.float32), 32)
        >>> q[0, :2].tolist(), float(scales[0, 0])
        ([-127, 64], 0.007874015718698502)
    """
    check_format(8, group, x_mk.shape[1], "the activations")
    parts = x_mk.reshape(x_mk.shape[0], -1, group)
    largest = np.abs(parts).max(axis=2, initial=0)
    finite = np.isfinite(largest)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(127) / largest
    usable = finite & np.isfinite(inverse)
    # In float64 the product with a float32 is exact, so that ties are ties on every machine.
    factor = np.where(usable, inverse, 0).astype(np.float64)[..., None]
    q = np.rint(np.where(finite[..., None], parts, 0) * factor).astype(np.int8)
    scales = np.where(finite, largest / np.float32(127), np.nan).astype(np.float32)
    return q.reshape(x_mk.shape), scales


def quantized_product(x_mk: NDArray[np.float32], weight: QuantizedArray) -> NDArray[np.float32]:
    """x (m, k) times the transposed weight (n, k): the result that every kernel is compared with.

    Both sides are whole numbers within a group, whose sum of products stays below 2^24. It is exact
    in float32 arithmetic, in whichever order. The groups are added in float64.

    Raises:
        InputError: x is no float32 matrix with rows of k.

    Example:
        >>> weight = quantize(np.full((1, 32), 0.5, np.float32), bits=4, group=32)
        >>> quantized_product(np.ones((1, 32), np.float32), weight)
        array([[16.]], dtype=float32)
    """
    n, k = weight.shape
    if x_mk.dtype != np.float32 or x_mk.ndim != 2 or x_mk.shape[1] != k:
        raise InputError(f"x must be float32 (m, {k}), got {x_mk.dtype} {x_mk.shape}")
    q_mk, x_scales = quantize_rows(x_mk, weight.group)
    x_parts = q_mk.reshape(-1, k // weight.group, weight.group).astype(np.float32)
    w_parts = unpack(weight.q, weight.bits, weight.group)
    w_scales = to_float32(weight.scales)
    y_mn = np.zeros((x_mk.shape[0], n), np.float64)
    for g in range(k // weight.group):
        numbers = w_parts[:, g].astype(np.float32) - _zero(weight.bits, weight.symmetric)
        whole = x_parts[:, g] @ numbers.T
        partial = whole * w_scales[:, g].astype(np.float64)
        if weight.minima is not None:
            sums = x_parts[:, g].sum(axis=1, keepdims=True)
            partial += sums * to_float32(weight.minima[:, g]).astype(np.float64)
        y_mn += partial * x_scales[:, g, None]
    return y_mn.astype(np.float32)


def ranges(parts: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The least and the largest of each group: (..., group) to two of (...).

    Example:
        >>> ranges(np.array([[1.0, -2.0]], np.float32))
        (array([-2.], dtype=float32), array([1.], dtype=float32))
    """
    return parts.min(axis=-1), parts.max(axis=-1)


def scales_of(
    low: NDArray[np.float32],
    high: NDArray[np.float32],
    bits: int,
    symmetric: bool,
    clip: NDArray[np.float32] | float = 1.0,
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Choose a scale for each group by its least and largest weight, and with an offset a minimum.

    `clip` is the share of the range that is kept.

    Returns:
        The scales and the minima, float32 with values that bfloat16 has. A scale of zero says
        that all weights of the group are its minimum, or zero.

    Example:
        >>> scales_of(np.float32([-1]), np.float32([4]), bits=4, symmetric=True)
        (array([-0.5], dtype=float32), None)
    """
    if not symmetric:
        minimum = _rounded(low * clip)
        return _rounded((high * clip - minimum) / np.float32(2**bits - 1)), minimum
    zero = 2 ** (bits - 1)
    extreme = np.where(-low > high, low, high)
    # At 8 bits the number 0 is not used: kernels may then multiply signed bytes.
    per_step = np.abs(extreme) / np.float32(zero - 1) if bits == 8 else extreme / np.float32(-zero)
    return _rounded(per_step * clip), None


def round_to(
    parts: NDArray[np.float32],
    scale: NDArray[np.float32],
    minimum: NDArray[np.float32] | None,
    bits: int,
) -> NDArray[np.uint8]:
    """The whole numbers nearest to weights (..., group), by the scale and minimum of `scales_of`.

    Symmetric 8-bit numbers begin at 1.

    Example:
        >>> round_to(np.float32([[-1, 4]]), np.float32([-0.5]), None, bits=4).tolist()
        [[10, 0]]
    """
    steps = _nearest(parts, scale, minimum, bits, np.empty_like(parts))
    steps += np.float32(_zero(bits, minimum is None))
    return steps.astype(np.uint8)


def squared_errors(
    parts: NDArray[np.float32],
    scale: NDArray[np.float32],
    minimum: NDArray[np.float32] | None,
    bits: int,
    room: NDArray[np.float32],
) -> NDArray[np.float32]:
    """The sum of squares, for each group of parts (..., group), of what rounding changes.

    It is that of `values_of(round_to(...)) - parts`, without the whole numbers as bytes on the way.
    `room` is memory like `parts`.

    Example:
        >>> parts = np.float32([[-1, 3.75]])
        >>> squared_errors(parts, np.float32([-0.5]), None, 4, np.empty_like(parts))
        array([0.0625], dtype=float32)
    """
    errors = _nearest(parts, scale, minimum, bits, room)
    errors *= scale[..., None]
    if minimum is not None:
        errors += minimum[..., None]
    errors -= parts
    total: NDArray[np.float32] = np.einsum("...p,...p->...", errors, errors)
    return total


def _nearest(
    parts: NDArray[np.float32],
    scale: NDArray[np.float32],
    minimum: NDArray[np.float32] | None,
    bits: int,
    out: NDArray[np.float32],
) -> NDArray[np.float32]:
    """The nearest whole numbers as floats, 0 being that of the minimum or of a weight of zero."""
    steps = parts if minimum is None else np.subtract(parts, minimum[..., None], out=out)
    divisor = np.where(scale == 0, np.float32(np.inf), scale)  # a quotient of 0
    np.divide(steps, divisor[..., None], out=out)
    np.rint(out, out=out)
    zero = _zero(bits, minimum is None)
    least = 1 - zero if bits == 8 and minimum is None else -zero
    return np.clip(out, np.float32(least), np.float32(2**bits - 1 - zero), out=out)


def values_of(
    q: NDArray[np.uint8], scale: NDArray[np.float32], minimum: NDArray[np.float32] | None, bits: int
) -> NDArray[np.float32]:
    """The weights that whole numbers stand for: the inverse of `round_to`.

    Example:
        >>> values_of(np.uint8([[10, 0]]), np.float32([-0.5]), None, bits=4).tolist()
        [[-1.0, 4.0]]
    """
    values = q.astype(np.float32)
    if minimum is None:
        values -= np.float32(_zero(bits, symmetric=True))
        values *= scale[..., None]
    else:
        values *= scale[..., None]
        values += minimum[..., None]
    return values


def _checked_clip(
    clip: float | NDArray[np.float32] | None, shape: tuple[int, int]
) -> NDArray[np.float32]:
    array = np.asarray(1.0 if clip is None else clip, np.float32)
    if array.shape not in ((), shape) or not ((array > 0) & (array <= 1)).all():
        raise ConfigError(
            f"clip must be one number or {shape}, each above 0 and at most 1, got "
            f"{array.item() if array.ndim == 0 else array.shape}"
        )
    return np.broadcast_to(array, shape)


def _zero(bits: int, symmetric: bool) -> int:
    """The whole number that stands for a weight of zero, if one does."""
    return 2 ** (bits - 1) if symmetric else 0


def _rounded(values: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """To what bfloat16 has, and to zero what is next to nothing."""
    kept = to_float32(to_bfloat16(values.astype(np.float32, copy=False)))
    return np.where(np.abs(kept) < _SMALLEST, np.float32(0), kept)
