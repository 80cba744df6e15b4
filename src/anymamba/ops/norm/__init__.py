"""RMSNorm, fused with the residual addition or the gate before it."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from anymamba.errors import InputError
from anymamba.ops.backends import implementation
from anymamba.ops.checks import check_shape

__all__ = ["rms_norm"]


def rms_norm(
    x: Float[Tensor, "... d"],
    weight_d: Float[Tensor, " d"],
    eps: float = 1e-5,
    *,
    gate: Float[Tensor, "... d"] | None = None,
    residual: Float[Tensor, "... d"] | None = None,
    return_sum: bool = False,
    residual_in_fp32: bool = False,
    backend: str | None = None,
) -> Float[Tensor, "... d"] | tuple[Float[Tensor, "... d"], Float[Tensor, "... d"]]:
    """Scale rows to a root mean square of one, after adding a residual. Differentiable.

    The sum and the norm are computed in float32 (float64 for float64 inputs).

    Args:
        x: (..., d).
        weight_d: the gain of each channel, (d,).
        eps: added to the mean square.
        gate: x is multiplied by silu(gate) first, (..., d). Excludes a residual and its sum.
        residual: added to x first, (..., d).
        return_sum: whether to return x + residual as well, which the next layer adds to.
        residual_in_fp32: whether that sum is float32 whatever the types of x and residual.
        backend: a choice for this call alone, see `anymamba.ops.backend`.

    Returns:
        The normed rows in the type of the weight, and with return_sum the sum in the wider type
        of x and residual, or in float32.

    Raises:
        InputError: a shape does not fit the others, or a gate and a residual are given.

    Source: "Root Mean Square Layer Normalization" (arXiv 1910.07467), equation 4.

    Example:
        >>> import torch
        >>> from anymamba.ops import rms_norm
        >>> rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2), 0.0).pow(2).mean().item()
        1.0
    """
    if x.ndim < 1:
        raise InputError("rms_norm: expected rows of shape (..., d), got a number")
    check_shape("rms_norm", "weight", weight_d, (x.shape[-1],))
    check_shape("rms_norm", "residual", residual, tuple(x.shape))
    check_shape("rms_norm", "gate", gate, tuple(x.shape))
    if gate is not None and (residual is not None or return_sum):
        raise InputError("rms_norm: a gate excludes a residual and the sum with it")
    arguments = (x, weight_d, eps, residual, residual_in_fp32, gate)
    normed, total = implementation("rms_norm", arguments, backend)(*arguments)
    return (normed, total) if return_sum else normed
