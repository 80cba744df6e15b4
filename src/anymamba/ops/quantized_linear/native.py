"""The product with a quantized weight through the native core, as a PyTorch operator."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from anymamba.ops.custom_operator import define_operator
from anymamba.ops.native import as_rows, core
from anymamba.ops.quantized_linear.reference import dequantize

_FEW_ROWS = 16  # up to here reading the weight decides, and no panel is worth its packing


def quantized_linear(
    x: Tensor, q: Tensor, scales: Tensor, minima: Tensor | None, bias_n: Tensor | None
) -> Tensor:
    """Arguments and returns as in `anymamba.ops.quantized_linear`."""
    bias = None if bias_n is None else bias_n.float()
    y: Tensor = _quantized_linear(as_rows(x), q, scales, minima, bias)
    return y.view(*x.shape[:-1], q.shape[0])


class _Inputs(NamedTuple):
    x: Tensor  # (rows, k)
    q: Tensor  # (n, k) or (n, k / 2)
    scales: Tensor  # (n, groups)
    minima: Tensor | None  # (n, groups)
    bias: Tensor | None  # (n,)


def _allocate(inputs: _Inputs) -> Tensor:
    return inputs.x.new_empty(inputs.x.shape[0], inputs.q.shape[0])


def _fill(inputs: _Inputs, y: Tensor) -> None:
    bare = [None if tensor is None else tensor.detach().contiguous() for tensor in inputs[1:]]
    few = y.shape[0] <= _FEW_ROWS
    in_float32 = y if y.dtype == torch.float32 else y.new_empty(y.shape, dtype=torch.float32)
    core().quantized_product(inputs.x.detach().float().contiguous(), *bare, in_float32, few)
    if in_float32 is not y:
        y.copy_(in_float32)


_quantized_linear = define_operator("quantized_linear", _Inputs, _allocate, _fill)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, q, scales, minima, bias = inputs
    ctx.save_for_backward(q, scales, minima)
    ctx.k, ctx.has_bias = x.shape[-1], bias is not None


def _go_back(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    q, scales, minima = ctx.saved_tensors
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = (dy.float() @ dequantize(q, scales, minima, ctx.k)).to(dy.dtype)
    if ctx.has_bias and ctx.needs_input_grad[4]:
        dbias = dy.float().sum(0)
    return dx, None, None, None, dbias


_quantized_linear.register_autograd(_go_back, setup_context=_keep)
