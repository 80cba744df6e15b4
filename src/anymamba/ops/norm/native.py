"""RMSNorm on a CPU through the native core, as PyTorch operators."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from anymamba.ops.derivatives import register_second_derivatives
from anymamba.ops.native import core
from anymamba.ops.norm import reference as norm_reference

__all__ = ["rms_norm"]


def rms_norm(
    x: Tensor, weight_d: Tensor, eps: float, residual: Tensor | None, residual_in_fp32: bool
) -> tuple[Tensor, Tensor]:
    """Normed rows and the sum; arguments as in `anymamba.ops.rms_norm`."""
    kept = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    # Not Size.numel(), which would turn symbolic sizes into constants.
    shape = (math.prod(x.shape[:-1]), x.shape[-1])
    rows = x.reshape(shape)
    other = None if residual is None else residual.reshape(shape)
    sum_type = torch.float32 if residual_in_fp32 else kept
    if other is None and sum_type == x.dtype:
        normed, _, _ = _norm(rows, weight_d.float(), None, eps, weight_d.dtype, None)
        return normed.view(x.shape), x
    normed, total, _ = _norm(rows, weight_d.float(), other, eps, weight_d.dtype, sum_type)
    return normed.view(x.shape), total.view(x.shape)


def _rows(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] < 2 else tensor.contiguous()


@torch.library.custom_op("anymamba::rms_norm", mutates_args=(), device_types="cpu")
def _norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    eps: float,
    normed_type: torch.dtype,
    sum_type: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normed rows, the sum (empty where sum_type is None) and 1 / rms of each row."""
    normed, total, scale = _outputs(x, weight, normed_type, sum_type)
    core().norm(
        _rows(x),
        None if residual is None else _rows(residual),
        weight.detach().contiguous(),
        eps,
        normed,
        None if sum_type is None else total,
        scale,
    )
    return normed, total, scale


def _outputs(
    x: Tensor, weight: Tensor, normed_type: torch.dtype, sum_type: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    shape = x.shape if sum_type is not None else (0,)
    return (
        x.new_empty(x.shape, dtype=normed_type),
        x.new_empty(shape, dtype=sum_type or x.dtype),
        x.new_empty(x.shape[0], dtype=torch.float32),
    )


@_norm.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    eps: float,
    normed_type: torch.dtype,
    sum_type: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x, weight, normed_type, sum_type)


@torch.library.custom_op("anymamba::rms_norm_backward", mutates_args=(), device_types="cpu")
def _norm_backward(
    total: Tensor,
    weight: Tensor,
    scale: Tensor,
    dnormed: Tensor,
    dtotal: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The gradients of the sum, in float32, and of the weight."""
    dx = total.new_empty(total.shape, dtype=torch.float32)
    dweight = weight.new_empty(weight.shape)
    core().norm_backward(
        _rows(total),
        weight.detach().contiguous(),
        eps,
        scale.detach(),
        _rows(dnormed),
        None if dtotal is None else _rows(dtotal),
        dx,
        dweight,
    )
    return dx, dweight


@_norm_backward.register_fake
def _(
    total: Tensor,
    weight: Tensor,
    scale: Tensor,
    dnormed: Tensor,
    dtotal: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return total.new_empty(total.shape, dtype=torch.float32), weight.new_empty(weight.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, residual, eps, _, sum_type = inputs
    _, total, scale = output
    ctx.save_for_backward(x if sum_type is None else total, weight, scale)
    ctx.eps = eps
    ctx.has_sum = sum_type is not None
    ctx.types = (x.dtype, None if residual is None else residual.dtype)
    ctx.set_materialize_grads(False)


def _go_back(ctx: Any, dnormed: Tensor | None, dtotal: Tensor | None, _: Any) -> tuple[Any, ...]:
    total, weight, scale = ctx.saved_tensors
    if dnormed is None:
        dnormed = torch.zeros_like(total)
    of_sum = dtotal if ctx.has_sum else None
    dx, dweight = _norm_backward(total, weight, scale, dnormed, of_sum, ctx.eps)
    x_type, residual_type = ctx.types
    dresidual = None if residual_type is None else dx.to(residual_type)
    return dx.to(x_type), dweight.to(weight.dtype), dresidual, None, None, None


_norm.register_autograd(_go_back, setup_context=_keep)


def _again(total: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    normed, _ = norm_reference.rms_norm(total, weight, arguments[-1], None, False)
    return normed, total


register_second_derivatives(_norm_backward, 2, slice(3, 5), _again)
