"""The product with a quantized weight through the native core, as a PyTorch operator."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from anymamba.ops.native import core
from anymamba.ops.quantized_linear.reference import widened

__all__ = ["quantized_linear"]

_FEW_ROWS = 16  # up to here reading the weight decides, and no panel is worth its packing


def quantized_linear(
    x: Tensor, q: Tensor, scales: Tensor, minima: Tensor | None, bias_n: Tensor | None
) -> Tensor:
    """Arguments and returns as in `anymamba.ops.quantized_linear`."""
    # Not Size.numel(), which would turn symbolic sizes into constants.
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    bias = None if bias_n is None else bias_n.float()
    y: Tensor = _quantized_linear(rows, q, scales, minima, bias)
    return y.view(*x.shape[:-1], q.shape[0])


@torch.library.custom_op("anymamba::quantized_linear", mutates_args=(), device_types="cpu")
def _quantized_linear(
    x: Tensor, q: Tensor, scales: Tensor, minima: Tensor | None, bias: Tensor | None
) -> Tensor:
    y = x.new_empty(x.shape[0], q.shape[0], dtype=torch.float32)
    bare = [None if t is None else t.detach().contiguous() for t in (q, scales, minima, bias)]
    few = x.shape[0] <= _FEW_ROWS
    core().quantized_product(x.detach().float().contiguous(), *bare, y, few)
    return y.to(x.dtype)


@_quantized_linear.register_fake
def _(x: Tensor, q: Tensor, scales: Tensor, minima: Tensor | None, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], q.shape[0])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, q, scales, minima, bias = inputs
    ctx.save_for_backward(q, scales, minima)
    ctx.k, ctx.has_bias = x.shape[-1], bias is not None


def _go_back(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    q, scales, minima = ctx.saved_tensors
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = (dy.float() @ widened(q, scales, minima, ctx.k)).to(dy.dtype)
    if ctx.has_bias and ctx.needs_input_grad[4]:
        dbias = dy.float().sum(0)
    return dx, None, None, None, dbias


_quantized_linear.register_autograd(_go_back, setup_context=_keep)
