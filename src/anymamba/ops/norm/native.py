"""RMSNorm on a CPU through the native core, as PyTorch operators."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from anymamba.ops.custom_operator import define_operator
from anymamba.ops.derivatives import register_second_derivatives
from anymamba.ops.native import as_rows, core
from anymamba.ops.norm import reference


def rms_norm(
    x: Tensor,
    weight_d: Tensor,
    eps: float,
    residual: Tensor | None,
    residual_in_fp32: bool,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Normed rows and the sum; arguments as in `anymamba.ops.rms_norm`."""
    kept = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    sum_type = torch.float32 if residual_in_fp32 else kept
    is_sum = residual is None and (gate is not None or sum_type == x.dtype)
    others = (None if tensor is None else as_rows(tensor) for tensor in (residual, gate))
    settings = (eps, weight_d.dtype, None if is_sum else sum_type)
    normed, total, _ = _norm(as_rows(x), weight_d.float(), *others, *settings)
    return normed.view(x.shape), x if is_sum else total.view(x.shape)


def _rows(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] < 2 else tensor.contiguous()


class _Inputs(NamedTuple):
    x: Tensor  # (rows, d)
    weight: Tensor  # (d,)
    residual: Tensor | None  # (rows, d)
    gate: Tensor | None  # (rows, d)
    eps: float
    normed_type: torch.dtype
    sum_type: torch.dtype | None


def _allocate(inputs: _Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Normed rows, the sum (empty where sum_type is None) and 1 / rms of each row."""
    x, sum_type = inputs.x, inputs.sum_type
    shape = x.shape if sum_type is not None else (0,)
    return (
        x.new_empty(x.shape, dtype=inputs.normed_type),
        x.new_empty(shape, dtype=sum_type or x.dtype),
        x.new_empty(x.shape[0], dtype=torch.float32),
    )


def _fill(inputs: _Inputs, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
    normed, total, scale = outputs
    core().norm(
        _rows(inputs.x),
        None if inputs.residual is None else _rows(inputs.residual),
        inputs.weight.detach().contiguous(),
        inputs.eps,
        normed,
        None if inputs.sum_type is None else total,
        scale,
        None if inputs.gate is None else _rows(inputs.gate),
    )


_norm = define_operator("rms_norm", _Inputs, _allocate, _fill)


class _BackwardInputs(NamedTuple):
    total: Tensor  # (rows, d); x where there is a gate
    weight: Tensor  # (d,)
    gate: Tensor | None  # (rows, d)
    scale: Tensor  # (rows,)
    dnormed: Tensor  # (rows, d)
    dtotal: Tensor | None  # (rows, d)
    eps: float


def _allocate_gradients(inputs: _BackwardInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Those of the sum, in float32, of the weight and of the gate (empty where there is none)."""
    total, weight, gate = inputs[:3]
    dgate = total.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    dtotal = total.new_empty(total.shape, dtype=torch.float32)
    return dtotal, weight.new_empty(weight.shape), dgate


def _fill_gradients(inputs: _BackwardInputs, gradients: tuple[Tensor, Tensor, Tensor]) -> None:
    total, weight, gate, scale, dnormed, dtotal, eps = inputs
    of_gate = () if gate is None else (_rows(gate), gradients[2])
    core().norm_backward(
        _rows(total),
        weight.detach().contiguous(),
        eps,
        scale.detach(),
        _rows(dnormed),
        None if dtotal is None else _rows(dtotal),
        *gradients[:2],
        *of_gate,
    )


_norm_backward = define_operator(
    "rms_norm_backward", _BackwardInputs, _allocate_gradients, _fill_gradients
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, residual, gate, eps, _, sum_type = inputs
    _, total, scale = output
    ctx.save_for_backward(x if sum_type is None else total, weight, gate, scale)
    ctx.eps = eps
    ctx.has_sum = sum_type is not None
    ctx.types = (x.dtype, None if residual is None else residual.dtype)
    ctx.set_materialize_grads(False)


def _go_back(ctx: Any, dnormed: Tensor | None, dtotal: Tensor | None, _: Any) -> tuple[Any, ...]:
    total, weight, gate, scale = ctx.saved_tensors
    if dnormed is None:
        dnormed = torch.zeros_like(total)
    of_sum = dtotal if ctx.has_sum else None
    dx, dweight, dgate = _norm_backward(total, weight, gate, scale, dnormed, of_sum, ctx.eps)
    x_type, residual_type = ctx.types
    dresidual = None if residual_type is None else dx.to(residual_type)
    of_gate = None if gate is None else dgate
    return dx.to(x_type), dweight.to(weight.dtype), dresidual, of_gate, None, None, None


_norm.register_autograd(_go_back, setup_context=_keep)


def _again(total: Tensor, weight: Tensor, gate: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    normed, _ = reference.rms_norm(total, weight, rest[-1], None, False, gate)
    return normed, total


register_second_derivatives(_norm_backward, 3, slice(4, 6), _again)
