"""The selective scan on a CPU through the native core, as PyTorch operators."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anymamba.ops.custom_operator import Recurrence, define_update
from anymamba.ops.native import core, handed, in_float32, segment_table
from anymamba.ops.scan import reference
from anymamba.ops.scan.arguments import ScanArguments, StepArguments, in_groups
from anymamba.ops.segments import count_states, segments_from_table


def selective_scan(arguments: ScanArguments) -> tuple[Tensor, Tensor]:
    """Arguments and returns as in `anymamba.ops.selective_scan`."""
    x_ble, delta_ble, A_en, B_bln, C_bln, D_e, z_ble, delta_bias_e, softplus = arguments[:9]
    tensors = (
        x_ble,
        delta_ble,
        in_float32(A_en),
        *in_groups(B_bln, C_bln, x_ble.ndim),
        in_float32(D_e),
        z_ble,
        in_float32(delta_bias_e),
        in_float32(arguments.initial_state),
    )
    will_go_back = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in tensors
    )
    y_ble, last, _ = _scan(
        *tensors,
        segment_table(arguments.segments),
        count_states(arguments.segments, x_ble.shape[0]),
        softplus,
        arguments.reverse,
        will_go_back,
    )
    return y_ble, last


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


class _Inputs(NamedTuple):
    x: Tensor  # (b, l, e)
    delta: Tensor  # (b, l, e)
    A: Tensor  # (e, n)
    B: Tensor  # (b, l, g, n)
    C: Tensor  # (b, l, g, n)
    D: Tensor | None  # (e,)
    z: Tensor | None  # (b, l, e)
    delta_bias: Tensor | None  # (e,)
    initial: Tensor | None  # (n_states, e, n)
    segments: Tensor | None  # (5, s)
    n_states: int
    softplus: bool
    reverse: bool
    will_go_back: bool = True

    def for_core(self) -> tuple[Any, ...]:
        """As the core takes them."""
        *tensors, initial = (handed(tensor) for tensor in self[:9])
        return *tensors, self.softplus, initial, self.segments, self.n_states, self.reverse


def _allocate(inputs: _Inputs) -> tuple[Tensor, Tensor, Tensor]:
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


def _forward(inputs: _Inputs, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
    y, last, kept = outputs
    used = _used(inputs, kept) if inputs.will_go_back else None
    if used is not None:
        kept[used.numel() :].zero_()
    core().scan(*inputs.for_core(), y, last, used)


def _backward(
    inputs: _Inputs, kept: Sequence[Tensor], dy: Tensor, dlast: Tensor | None, gradients: Any
) -> None:
    core().scan_backward(
        *inputs.for_core(),
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


def _used(inputs: _Inputs, kept: Tensor) -> Tensor:
    """The part of the states kept for the backward pass that these segments fill."""
    sizes = (*inputs.x.shape, inputs.A.shape[1])
    floats = core().scan_checkpoint_floats(*sizes, inputs.segments, inputs.n_states)
    return kept.detach()[:floats]


def _reference(inputs: _Inputs) -> tuple[Tensor, Tensor]:
    x, delta, A, B, C, D, z, delta_bias, initial, table, n_states, softplus, reverse, _ = inputs
    segments = segments_from_table(table, n_states)
    options = (delta_bias, softplus, initial, True, segments, reverse)
    return reference.selective_scan(ScanArguments(x, delta, A, B, C, D, z, *options))


_scan = Recurrence(
    "selective_scan",
    _Inputs,
    allocate=_allocate,
    forward=_forward,
    backward=_backward,
    reference=_reference,
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
