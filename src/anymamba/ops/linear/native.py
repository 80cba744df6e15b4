"""The matrix product on a CPU through the native core, as a PyTorch operator."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from anymamba.ops.native import core

__all__ = ["linear"]


def linear(x: Tensor, weight_nk: Tensor, bias_n: Tensor | None) -> Tensor:
    """Arguments and returns as in `anymamba.ops.linear`."""
    # Not Size.numel(), which would turn symbolic sizes into constants.
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y: Tensor = _linear(rows, weight_nk, None if bias_n is None else bias_n.float())
    return y.view(*x.shape[:-1], weight_nk.shape[0])


def _product(a: Tensor, b: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """a (m, k) times b (k, n), of any strides and types, plus bias (n,)."""
    c = a.new_empty(a.shape[0], b.shape[1], dtype=dtype)
    bare_bias = None if bias is None else bias.detach().contiguous()
    core().product(a.detach(), b.detach(), bare_bias, c)
    return c


@torch.library.custom_op("anymamba::linear", mutates_args=(), device_types="cpu")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _product(x, weight.t(), bias, x.dtype)


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("anymamba::linear_backward", mutates_args=(), device_types="cpu")
def _linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight, empty where they are not needed."""
    nothing = x.new_empty(0)
    dx = _product(dy, weight, None, x.dtype) if needs_x else nothing
    dweight = _product(dy.t(), x, None, weight.dtype) if needs_weight else nothing.clone()
    return dx, dweight


@_linear_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return dx if needs_x else x.new_empty(0), dweight if needs_weight else x.new_empty(0)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_type = None if bias is None else bias.dtype


def _go_back(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    dx, dweight = _linear_backward(dy, x, weight, needs_x, needs_weight)
    dbias = dy.float().sum(0).to(ctx.bias_type) if ctx.bias_type and needs_bias else None
    return dx if needs_x else None, dweight if needs_weight else None, dbias


_linear.register_autograd(_go_back, setup_context=_keep)


def _keep_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    dy, x, weight, ctx.needs_x, ctx.needs_weight = inputs
    ctx.save_for_backward(dy, x, weight)
    ctx.set_materialize_grads(False)


def _go_back_twice(ctx: Any, ddx: Tensor | None, ddweight: Tensor | None) -> tuple[Any, ...]:
    """Gradients of the gradients dx = dy W and dW = dy^T x: products again."""
    dy, x, weight = ctx.saved_tensors
    of_dy = of_x = of_weight = None
    if ctx.needs_x and ddx is not None:
        of_dy = _linear(ddx, weight, None)
        of_weight = _linear(dy.t(), ddx.t().to(dy.dtype), None).to(weight.dtype)
    if ctx.needs_weight and ddweight is not None:
        through_weight = _linear(x, ddweight, None)
        of_dy = through_weight if of_dy is None else of_dy + through_weight
        of_x = _linear(dy, ddweight.t(), None)
    return of_dy, of_x, of_weight, None, None


_linear_backward.register_autograd(_go_back_twice, setup_context=_keep_backward)
