"""y = x W^T + bias, at float32's speed whatever type the weight is stored in."""

from __future__ import annotations

from typing import cast

from jaxtyping import Float
from torch import Tensor

from anymamba.errors import InputError
from anymamba.ops.backends import implementation
from anymamba.ops.checks import check_shape

__all__ = ["linear"]


def linear(
    x: Float[Tensor, "... k"],
    weight_nk: Float[Tensor, "n k"],
    bias_n: Float[Tensor, " n"] | None = None,
    *,
    backend: str | None = None,
) -> Float[Tensor, "... n"]:
    """Multiply rows by a matrix. Differentiable in every tensor.

    Sums are float32 (on the native core also where weights or rows are bfloat16 or float16,
    which are converted a panel at a time instead of being multiplied as they are).

    Args:
        x: rows of width k, (..., k).
        weight_nk: (n, k), as `torch.nn.Linear` stores it.
        bias_n: (n,).
        backend: a choice for this call alone, see `anymamba.ops.backend`.

    Returns:
        (..., n) in the type of x.

    Raises:
        InputError: a shape does not fit the others.

    Example:
        >>> import torch
        >>> from anymamba.ops import linear
        >>> linear(torch.ones(1, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist()
        [[3.0, 7.0]]
    """
    if x.ndim < 1 or weight_nk.ndim != 2:
        raise InputError(
            f"linear: expected rows (..., k) and a weight (n, k), got {tuple(x.shape)} and "
            f"{tuple(weight_nk.shape)}"
        )
    n = weight_nk.shape[0]
    check_shape("linear", "weight", weight_nk, (n, x.shape[-1]))
    check_shape("linear", "bias", bias_n, (n,))
    arguments = (x, weight_nk, bias_n)
    return cast(Tensor, implementation("linear", arguments, backend)(*arguments))
