"""The selective scan on a CPU through the native core, as PyTorch operators."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from anymamba.ops.custom_operator import Recurrence, define_update
from anymamba.ops.native import core, handed, in_float32
from anymamba.ops.scan.arguments import ScanArguments, StepArguments, in_groups
from anymamba.ops.scan.operator import ScanInputs, by_reference, call


def selective_scan(arguments: ScanArguments) -> tuple[Tensor, Tensor]:
    """Arguments and returns as in `anymamba.ops.selective_scan`."""
    return call(_scan, arguments)


@torch.no_grad()
def selective_state_update(arguments: StepArguments) -> Tensor:
    """Arguments and returns as in `anymamba.ops.selective_state_update`."""
    x_be, delta_be, A_en, B_bn, C_bn, D_e, z_be, delta_bias_e, softplus, state_ben = arguments
    state = state_ben
    # Rows may lie apart, but each without gaps.
    if state.dtype != torch.float32 or not (state.is_contiguous() or state[:1].is_contiguous()):
        state = state.detach().to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    y_be: Tensor = _scan_step(
        state,
        x_be,
        delta_be,
        in_float32(A_en),
        *in_groups(B_bn, C_bn, x_be.ndim),
        in_float32(D_e),
        z_be,
        in_float32(delta_bias_e),
        softplus,
    )
    if state is not state_ben:
        state_ben.detach().copy_(state)
    return y_be


def _for_core(inputs: ScanInputs) -> tuple[Any, ...]:
    """As the core takes them."""
    *tensors, initial = (handed(tensor) for tensor in inputs[:9])
    options = (inputs.segments, inputs.n_states, inputs.reverse)
    return *tensors, inputs.softplus, initial, *options


def _allocate(inputs: ScanInputs) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last states, and what the backward pass needs (empty unless it will come)."""
    x, segments = inputs.x, inputs.segments
    (b, l, _), (e, n) = x.shape, inputs.A.shape
    steps = _chunk_steps()
    chunks = b * (-(-l // steps))
    if segments is not None:
        # As many as fit, and a last one of each segment: a size that its shapes alone decide.
        chunks = b * l // steps + segments.shape[1]
    last = x.new_empty((inputs.n_states, e, n), dtype=torch.float32)
    kept = x.new_empty(chunks * e * n if inputs.will_go_back else 0, dtype=torch.float32)
    return torch.empty_like(x), last, kept


def _forward(inputs: ScanInputs, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
    y, last, kept = outputs
    used = _used(inputs, kept) if inputs.will_go_back else None
    if used is not None:
        kept[used.numel() :].zero_()
    core().scan(*_for_core(inputs), y, last, used)


def _backward(
    inputs: ScanInputs, kept: Sequence[Tensor], dy: Tensor, dlast: Tensor | None, gradients: Any
) -> None:
    core().scan_backward(
        *_for_core(inputs),
        _used(inputs, kept[0]),
        dy.detach(),
        None if dlast is None else dlast.detach().contiguous(),
        *gradients,
    )


@cache
def _chunk_steps() -> int:
    """How many steps lie between two states that are kept for the backward pass."""
    many = 1 << 20
    chunks: int = core().scan_checkpoint_floats(1, many, 1, 1)
    return many // chunks


def _used(inputs: ScanInputs, kept: Tensor) -> Tensor:
    """The part of the states kept for the backward pass that these segments fill."""
    sizes = (*inputs.x.shape, inputs.A.shape[1])
    floats = core().scan_checkpoint_floats(*sizes, inputs.segments, inputs.n_states)
    return kept.detach()[:floats]


_scan = Recurrence(
    "selective_scan",
    ScanInputs,
    allocate=_allocate,
    forward=_forward,
    backward=_backward,
    reference=by_reference,
    in_float32=("B", "C"),  # which are summed over channels
).operator


def _step(
    state: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    softplus: bool,
) -> Tensor:
    y = torch.empty_like(x)
    inputs = [handed(t) for t in (state, x, delta, A, B, C, D, z, delta_bias)]
    core().scan_step(*inputs, softplus, handed(y))
    return y


_scan_step = define_update("selective_state_update", _step, state=0, x=1)
