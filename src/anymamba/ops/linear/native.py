"""The matrix product on a CPU through the native core, as a PyTorch operator."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from anymamba.ops.custom_operator import define_operator
from anymamba.ops.native import as_rows, core


def linear(x: Tensor, weight_nk: Tensor, bias_n: Tensor | None) -> Tensor:
    """Arguments and returns as in `anymamba.ops.linear`."""
    y: Tensor = _linear(as_rows(x), weight_nk, None if bias_n is None else bias_n.float())
    return y.view(*x.shape[:-1], weight_nk.shape[0])


class _Inputs(NamedTuple):
    x: Tensor  # (rows, k)
    weight: Tensor  # (n, k)
    bias: Tensor | None  # (n,)


def _allocate(inputs: _Inputs) -> Tensor:
    return inputs.x.new_empty(inputs.x.shape[0], inputs.weight.shape[0])


def _fill(inputs: _Inputs, y: Tensor) -> None:
    bias = None if inputs.bias is None else inputs.bias.detach().contiguous()
    core().product(inputs.x.detach(), inputs.weight.detach().t(), bias, y)


_linear = define_operator("linear", _Inputs, _allocate, _fill)


class _BackwardInputs(NamedTuple):
    dy: Tensor  # (rows, n)
    x: Tensor  # (rows, k)
    weight: Tensor  # (n, k)
    needs_x: bool
    needs_weight: bool


def _allocate_gradients(inputs: _BackwardInputs) -> tuple[Tensor, Tensor]:
    """Those of x and weight, empty where they are not needed."""
    x, weight = inputs.x, inputs.weight
    return (
        x.new_empty(x.shape if inputs.needs_x else (0,)),
        weight.new_empty(weight.shape if inputs.needs_weight else (0,)),
    )


def _fill_gradients(inputs: _BackwardInputs, gradients: tuple[Tensor, Tensor]) -> None:
    dy, x, weight = (tensor.detach() for tensor in inputs[:3])
    dx, dweight = gradients
    if inputs.needs_x:
        core().product(dy, weight, None, dx)
    if inputs.needs_weight:
        core().product(dy.t(), x, None, dweight)


_linear_backward = define_operator(
    "linear_backward", _BackwardInputs, _allocate_gradients, _fill_gradients
)


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
