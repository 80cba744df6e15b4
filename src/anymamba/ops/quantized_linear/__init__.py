"""y = x W^T + bias with a weight of 8 or 4 bits."""

from __future__ import annotations

from typing import cast

from jaxtyping import Float, Int
from torch import Tensor

from anymamba.errors import InputError
from anymamba.ops.backends import implementation
from anymamba.ops.checks import check_shape

__all__ = ["quantized_linear"]


def quantized_linear(
    x: Float[Tensor, "... k"],
    q: Int[Tensor, "n columns"],
    scales: Float[Tensor, "n groups"],
    minima: Float[Tensor, "n groups"] | None = None,
    bias_n: Float[Tensor, " n"] | None = None,
    *,
    backend: str | None = None,
) -> Float[Tensor, "... n"]:
    """Multiply rows by a quantized matrix. Differentiable in x and bias.

    The rows are rounded to 8 bits in the weight's groups, so that within a group all arithmetic is
    in whole numbers; docs/quantization.md describes the format. The gradient of x is that of the
    product without this rounding.

    Args:
        x: rows of width k, (..., k).
        q: uint8, (n, k) for 8 bits or (n, k / 2) for 4.
        scales: bfloat16, (n, k / group).
        minima: bfloat16, (n, k / group), for weights with an offset.
        bias_n: (n,).
        backend: a choice for this call alone, see `anymamba.ops.backend`.

    Returns:
        (..., n) in the type of x.

    Raises:
        InputError: a shape does not fit the others.

    Example:
        >>> import torch
        >>> from anymamba.ops import quantized_linear
        >>> q = torch.full((1, 32), 130, dtype=torch.uint8)  # each weight is (130 - 128) / 2
        >>> scales = torch.full((1, 1), 0.5, dtype=torch.bfloat16)
        >>> quantized_linear(torch.ones(1, 32), q, scales).round().tolist()
        [[32.0]]
    """
    if x.ndim < 1 or q.ndim != 2 or scales.ndim != 2:
        raise InputError(
            f"quantized_linear: expected rows (..., k), q (n, columns) and scales (n, groups), got "
            f"{tuple(x.shape)}, {tuple(q.shape)} and {tuple(scales.shape)}"
        )
    n, k = q.shape[0], x.shape[-1]
    if q.shape[1] not in (k, k // 2) or scales.shape[1] == 0 or k % scales.shape[1] != 0:
        raise InputError(
            f"quantized_linear: q of shape {tuple(q.shape)} and scales of shape "
            f"{tuple(scales.shape)} do not fit rows of {k}"
        )
    check_shape("quantized_linear", "scales", scales, (n, scales.shape[1]))
    check_shape("quantized_linear", "minima", minima, tuple(scales.shape))
    check_shape("quantized_linear", "bias", bias_n, (n,))
    arguments = (x, q, scales, minima, bias_n)
    return cast(Tensor, implementation("quantized_linear", arguments, backend)(*arguments))
