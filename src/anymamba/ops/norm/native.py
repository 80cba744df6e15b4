"""RMSNorm on a CPU through the native core, as PyTorch operators."""

from __future__ import annotations

from torch import Tensor

from anymamba.ops.native import as_rows, core
from anymamba.ops.norm.operator import GradientInputs, NormInputs, Outputs, define_norm, norm_inputs


def rms_norm(
    x: Tensor,
    weight_d: Tensor,
    eps: float,
    residual: Tensor | None,
    residual_in_fp32: bool,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Normed rows and the sum; arguments as in `anymamba.ops.rms_norm`."""
    inputs = norm_inputs(x, weight_d, eps, residual, residual_in_fp32, gate)
    others = (None if tensor is None else as_rows(tensor) for tensor in (residual, gate))
    normed, total, _ = _norm(as_rows(x), weight_d.float(), *others, *inputs[4:])
    return normed.view(x.shape), x if inputs.sum_type is None else total.view(x.shape)


def _rows(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] < 2 else tensor.contiguous()


def _fill(inputs: NormInputs, outputs: Outputs) -> None:
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


def _fill_gradients(inputs: GradientInputs, gradients: Outputs) -> None:
    total, weight, gate, scale, dnormed, dtotal, eps, _ = inputs
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


_norm = define_norm("rms_norm", _fill, _fill_gradients, in_float32=True, device_types="cpu")
