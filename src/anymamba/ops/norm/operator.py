"""RMSNorm as an operator of PyTorch: what its kernels fill, on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anymamba.ops.custom_operator import define_operator
from anymamba.ops.derivatives import register_second_derivatives
from anymamba.ops.norm import reference

Outputs = tuple[Tensor, Tensor, Tensor]


class NormInputs(NamedTuple):
    """Rows of d numbers, along any axes; the sum's type is None where it is not wanted."""

    x: Tensor  # (..., d)
    weight: Tensor  # (d,)
    residual: Tensor | None  # (..., d)
    gate: Tensor | None  # (..., d)
    eps: float
    normed_type: torch.dtype
    sum_type: torch.dtype | None


class GradientInputs(NamedTuple):
    """What the backward pass computes the gradients of the sum, the weight and the gate from."""

    total: Tensor  # (..., d); x where there is a gate
    weight: Tensor  # (d,)
    gate: Tensor | None  # (..., d)
    scale: Tensor  # (...)
    dnormed: Tensor  # (..., d)
    dtotal: Tensor | None  # (..., d)
    eps: float
    gradient_type: torch.dtype  # of the sum's gradient


def norm_inputs(
    x: Tensor,
    weight_d: Tensor,
    eps: float,
    residual: Tensor | None,
    residual_in_fp32: bool,
    gate: Tensor | None,
) -> NormInputs:
    """The operator's inputs from the arguments of `anymamba.ops.rms_norm`."""
    kept = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    sum_type = torch.float32 if residual_in_fp32 else kept
    is_sum = residual is None and (gate is not None or sum_type == x.dtype)
    return NormInputs(
        x, weight_d, residual, gate, eps, weight_d.dtype, None if is_sum else sum_type
    )


def define_norm(
    name: str,
    fill: Callable[[NormInputs, Outputs], None],
    fill_gradients: Callable[[GradientInputs, Outputs], None],
    *,
    in_float32: bool,
    device_types: str | None,
) -> Any:
    """Define the operator and `name_backward`, which computes its gradients.

    Args:
        name: its name in `torch.ops.anymamba`.
        fill: computes normed rows, the sum (empty where its type is None) and 1 / rms of each row.
        fill_gradients: computes those of the sum, the weight and the gate (empty where it is None).
        in_float32: whether the sum's gradient is float32, else it has the widest type of what was
            added.
        device_types: the devices that it runs on, None for all.
    """
    forward = define_operator(name, NormInputs, _allocate, fill, device_types)
    backward = define_operator(
        f"{name}_backward", GradientInputs, _allocate_gradients, fill_gradients, device_types
    )

    def go_back(ctx: Any, dnormed: Tensor | None, dtotal: Tensor | None, _: Any) -> tuple[Any, ...]:
        total, weight, gate, scale = ctx.saved_tensors
        if dnormed is None:
            dnormed = torch.zeros_like(total)
        of_sum = dtotal if ctx.has_sum else None
        x_type, residual_type = ctx.types
        widest = x_type if residual_type is None else torch.promote_types(x_type, residual_type)
        kept = (total, weight, gate, scale, dnormed, of_sum, ctx.eps)
        dx, dweight, dgate = backward(*kept, torch.float32 if in_float32 else widest)
        dresidual = None if residual_type is None else dx.to(residual_type)
        of_gate = None if gate is None else dgate
        return dx.to(x_type), dweight.to(weight.dtype), dresidual, of_gate, None, None, None

    forward.register_autograd(go_back, setup_context=_keep)
    register_second_derivatives(backward, 3, slice(4, 6), _again)
    return forward


def _allocate(inputs: NormInputs) -> Outputs:
    x, sum_type = inputs.x, inputs.sum_type
    shape = x.shape if sum_type is not None else (0,)
    return (
        x.new_empty(x.shape, dtype=inputs.normed_type),
        x.new_empty(shape, dtype=sum_type or x.dtype),
        x.new_empty(x.shape[:-1], dtype=torch.float32),
    )


def _allocate_gradients(inputs: GradientInputs) -> Outputs:
    total, weight, gate = inputs[:3]
    dgate = total.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    dtotal = total.new_empty(total.shape, dtype=inputs.gradient_type)
    return dtotal, weight.new_empty(weight.shape), dgate


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    x, weight, residual, gate, eps, _, sum_type = inputs
    _, total, scale = output
    ctx.save_for_backward(x if sum_type is None else total, weight, gate, scale)
    ctx.eps = eps
    ctx.has_sum = sum_type is not None
    ctx.types = (x.dtype, None if residual is None else residual.dtype)
    ctx.set_materialize_grads(False)


def _again(total: Tensor, weight: Tensor, gate: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    _, _, _, eps, _ = rest
    normed, _ = reference.rms_norm(total, weight, eps, None, False, gate)
    return normed, total
