"""LayerNorm and RMSNorm, fused with what stands before them in a block.

    sum = dropout(x * rowscale) + dropout(x1) + residual        out = norm(sum) * weight + bias

The sum and the norm are computed in float32 (float64 for float64 inputs). A second gain and offset,
weight1 and bias1, give a second output of the same sum, for blocks whose layers stand side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anymamba import ops
from anymamba.dropin.dispatch import by_device
from anymamba.errors import InputError
from anymamba.ops.checks import check_shape
from anymamba.ops.tracing import autocast_is_on

__all__ = [
    "LayerNormFn",
    "LayerNormLinearFn",
    "RMSNorm",
    "layer_norm_fn",
    "layer_norm_linear_fn",
    "layer_norm_ref",
    "rms_norm_fn",
    "rms_norm_ref",
]

Output = Tensor | tuple[Tensor | None, ...]
Masks = tuple[Tensor | None, Tensor | None]


@by_device
def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Output:
    """Add what comes together before a layer, and norm the sum. Differentiable in every tensor.

    Args:
        x: (..., d).
        weight, bias: gain and offset of each channel, (d,).
        residual: added to x, (..., d).
        x1: added to x too, (..., d); not together with rowscale.
        weight1, bias1: gain and offset of a second output, (d,).
        eps: added to the variance, or to the mean square.
        dropout_p: how likely each number of x, and each of x1, is dropped.
        rowscale: a factor for each row of x, (...).
        prenorm: whether to return the sum as well, which the next layer adds to.
        residual_in_fp32: whether that sum is float32 where no residual decides its type.
        is_rms_norm: RMSNorm in place of LayerNorm.
        return_dropout_mask: whether to return which numbers of x and of x1 were kept.

    Returns:
        The normed rows in the type of x; with more asked for a tuple of them, then the second
        output (with weight1), the sum (with prenorm) in the type of the residual, or of x, and
        two masks (with return_dropout_mask; None for what was not dropped from).

    Raises:
        InputError: a shape does not fit the others, or x1 comes with rowscale.

    Example:
        >>> x, residual = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]])
        >>> out, total = layer_norm_fn(
        ...     x, torch.ones(2), torch.zeros(2), residual, eps=0.0, prenorm=True
        ... )
        >>> out.tolist(), total.tolist()
        ([[-1.0, 1.0]], [[2.0, 6.0]])
    """
    _check(x, (weight, bias, weight1, bias1), residual, x1, rowscale)
    joined, masks = _before_the_residual(x, x1, rowscale, dropout_p)
    norm = _rms_norm if is_rms_norm else _layer_norm
    sum_type = x.dtype if not residual_in_fp32 else torch.promote_types(x.dtype, torch.float32)
    if residual is not None:
        sum_type = residual.dtype
    out, total = norm(joined, residual, weight, bias, eps, sum_type)
    outputs: list[Tensor | None] = [out.to(x.dtype)]
    if weight1 is not None:
        outputs.append(norm(joined, residual, weight1, bias1, eps, sum_type)[0].to(x.dtype))
    if prenorm:
        outputs.append(total)
    if return_dropout_mask:
        outputs += masks
    return outputs[0] if len(outputs) == 1 and outputs[0] is not None else tuple(outputs)


@by_device
def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Output:
    """`layer_norm_fn` with `is_rms_norm`: all else is said there.

    Example:
        >>> rms_norm_fn(torch.tensor([[1.0, -1.0]]), 3 * torch.ones(2), None, eps=0.0).tolist()
        [[3.0, -3.0]]
    """
    tensors = (x, weight, bias, residual, x1, weight1, bias1)
    options = (eps, dropout_p, rowscale, prenorm, residual_in_fp32, True, return_dropout_mask)
    return layer_norm_fn(*tensors, *options)


class LayerNormFn:
    """`layer_norm_fn` for programs that call the original's autograd function by its name."""

    apply = staticmethod(layer_norm_fn)


@by_device
def layer_norm_linear_fn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Output:
    """`layer_norm_fn` and a linear layer after it. Differentiable in every tensor.

    Args:
        x, residual, eps, prenorm, residual_in_fp32, is_rms_norm: as in `layer_norm_fn`.
        norm_weight, norm_bias: its weight and bias, (d,).
        linear_weight, linear_bias: of the layer after it, (o, d) and (o,).

    Returns:
        (..., o), and with prenorm a tuple of that and the sum before the norm, (..., d).

    Raises:
        InputError: a shape does not fit the others.

    Example:
        >>> x, ones = torch.tensor([[2.0, 6.0]]), torch.ones(2)
        >>> layer_norm_linear_fn(x, ones, None, torch.tensor([[1.0, 3.0]]), None, eps=0.0).tolist()
        [[2.0]]
    """
    both = layer_norm_fn(
        x,
        norm_weight,
        norm_bias,
        residual,
        eps=eps,
        prenorm=True,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm,
    )
    normed, total = cast("tuple[Tensor, Tensor]", both)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast_is_on(x.device) else normed.dtype
    bias = None if linear_bias is None else linear_bias.to(dtype)
    out = F.linear(normed.to(dtype), linear_weight.to(dtype), bias)
    return (out, total) if prenorm else out


class LayerNormLinearFn:
    """`layer_norm_linear_fn` for programs that call the original's autograd function by name."""

    apply = staticmethod(layer_norm_linear_fn)


class RMSNorm(nn.Module):
    """RMSNorm over the last axis, after adding a residual.

    Args:
        hidden_size: d, the number of channels.
        eps: added to the mean square.
        dropout_p: how likely, in training, each number of the input is dropped.
        device, dtype: of the weight.

    Example:
        >>> RMSNorm(2, eps=0.0)(torch.tensor([[1.0, -1.0]])).tolist()
        [[1.0, -1.0]]
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0.0 else None
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set all gains to one."""
        nn.init.ones_(self.weight)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Output:
        """The normed rows, and with prenorm the sum as well: see `layer_norm_fn`."""
        return rms_norm_fn(
            x,
            self.weight,
            None,
            residual=residual,
            eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )


def layer_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
) -> Output:
    """`layer_norm_fn` step by step in the type of x, or with `upcast` in float32.

    Args:
        dropout_mask, dropout_mask1: which numbers of x and of x1 to keep; drawn when None.
        upcast: whether to compute in float32. The sum is then returned in it, too.
    """
    gains, masks = ((weight, bias), (weight1, bias1)), (dropout_mask, dropout_mask1)
    options = (eps, dropout_p, rowscale, prenorm, masks, upcast)
    return _reference(_plain_layer_norm, x, gains, residual, x1, *options)


def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
) -> Output:
    """`rms_norm_fn` step by step; arguments as in `layer_norm_ref`."""
    gains, masks = ((weight, bias), (weight1, bias1)), (dropout_mask, dropout_mask1)
    options = (eps, dropout_p, rowscale, prenorm, masks, upcast)
    return _reference(_plain_rms_norm, x, gains, residual, x1, *options)


def _before_the_residual(
    x: Tensor,
    x1: Tensor | None,
    rowscale: Tensor | None,
    dropout_p: float,
    masks: Masks = (None, None),
) -> tuple[Tensor, Masks]:
    """Both inputs scaled, dropped from and added, and what was kept of each."""
    if x1 is None and rowscale is None and dropout_p == 0.0:
        return x, (None, None)
    wide = torch.promote_types(x.dtype, torch.float32)
    joined = x.to(wide)
    if rowscale is not None:
        joined = joined * rowscale.to(wide)[..., None]
    joined, kept = _dropped(joined, dropout_p, masks[0])
    if x1 is None:
        return joined, (kept, None)
    other, kept1 = _dropped(x1.to(wide), dropout_p, masks[1])
    return joined + other, (kept, kept1)


def _dropped(x: Tensor, dropout_p: float, kept: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if dropout_p == 0.0:
        return x, None
    if kept is None:
        kept = torch.rand_like(x) >= dropout_p
    return torch.where(kept, x / (1.0 - dropout_p), 0.0), kept


def _layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    sum_type: torch.dtype,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.to(wide) if residual is None else x.to(wide) + residual.to(wide)
    offset = None if bias is None else bias.to(wide)
    normed = F.layer_norm(total, x.shape[-1:], weight.to(wide), offset, eps)
    return normed, total.to(sum_type)


def _rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    sum_type: torch.dtype,
) -> tuple[Tensor, Tensor]:
    # The operator returns the type of its weight, which must not be narrower than what follows.
    wide = torch.promote_types(x.dtype, weight.dtype if bias is None else torch.float32)
    normed, total = ops.rms_norm(x, weight.to(wide), eps, residual=residual, return_sum=True)
    return (normed if bias is None else normed + bias.to(wide)), total.to(sum_type)


def _reference(
    norm: Callable[[Tensor, Tensor, Tensor | None, float], Tensor],
    x: Tensor,
    gains: tuple[tuple[Tensor, Tensor | None], tuple[Tensor | None, Tensor | None]],
    residual: Tensor | None,
    x1: Tensor | None,
    eps: float,
    dropout_p: float,
    rowscale: Tensor | None,
    prenorm: bool,
    masks: Masks,
    upcast: bool,
) -> Output:
    (weight, bias), (weight1, bias1) = gains
    _check(x, (weight, bias, weight1, bias1), residual, x1, rowscale)
    total, _ = _before_the_residual(x, x1, rowscale, dropout_p, masks)
    if residual is not None:
        total = total + residual
    total = total.to(torch.float32 if upcast else x.dtype)
    outputs = [norm(total, weight, bias, eps).to(x.dtype)]
    if weight1 is not None:
        outputs.append(norm(total, weight1, bias1, eps).to(x.dtype))
    if prenorm:
        outputs.append(total)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _plain_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return _plain_rms_norm(centred, weight, bias, eps)


def _plain_rms_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    return scaled if bias is None else scaled + bias


def _check(
    x: Tensor,
    vectors: tuple[Tensor | None, ...],
    residual: Tensor | None,
    x1: Tensor | None,
    rowscale: Tensor | None,
) -> None:
    for name, vector in zip(("weight", "bias", "weight1", "bias1"), vectors, strict=True):
        check_shape("layer_norm_fn", name, vector, tuple(x.shape[-1:]))
    for name, rows in (("residual", residual), ("x1", x1)):
        check_shape("layer_norm_fn", name, rows, tuple(x.shape))
    check_shape("layer_norm_fn", "rowscale", rowscale, tuple(x.shape[:-1]))
    if x1 is not None and rowscale is not None:
        raise InputError("layer_norm_fn: rowscale cannot come with x1; scale the rows of x first")
