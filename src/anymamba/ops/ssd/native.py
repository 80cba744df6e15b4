"""The state space duality on a CPU through the native core, as PyTorch operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anymamba.ops.custom_operator import Recurrence, define_update
from anymamba.ops.native import core, handed, in_float32, segment_table
from anymamba.ops.segments import count_states, segments_from_table
from anymamba.ops.ssd import chunked
from anymamba.ops.ssd.arguments import SsdArguments, SsdStepArguments


def ssd(arguments: SsdArguments) -> tuple[Tensor, Tensor]:
    """Arguments and returns as in `anymamba.ops.ssd`; the core chooses the length of chunks."""
    x, dt, A, B, C, D, z, dt_bias, softplus, (low, high), initial, _, segments, _ = arguments
    y_ble, last = _ssd(
        x.flatten(2),
        dt,
        in_float32(A),
        B,
        C,
        in_float32(D),
        None if z is None else z.flatten(2),
        in_float32(dt_bias),
        in_float32(initial),
        segment_table(segments),
        count_states(segments, x.shape[0]),
        softplus,
        low,
        high,
    )
    return y_ble.view(x.shape), last


@torch.no_grad()
def ssd_state_update(arguments: SsdStepArguments) -> Tensor:
    """Arguments and returns as in `anymamba.ops.ssd_state_update`."""
    x, dt, A, B, C, D, z, dt_bias, softplus, (low, high), state_bhpn = arguments
    state = state_bhpn
    # Rows may lie apart, but each without gaps.
    if state.dtype != torch.float32 or not (state.is_contiguous() or state[:1].is_contiguous()):
        state = state.detach().to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    y_be: Tensor = _ssd_step(
        state,
        x.flatten(1),
        dt,
        in_float32(A),
        B,
        C,
        in_float32(D),
        None if z is None else z.flatten(1),
        in_float32(dt_bias),
        softplus,
        low,
        high,
    )
    if state is not state_bhpn:
        state_bhpn.detach().copy_(state)
    return y_be.view(x.shape)


class _Inputs(NamedTuple):
    x: Tensor  # (b, l, e), the channels of all heads side by side
    dt: Tensor  # (b, l, h)
    A: Tensor  # (h,)
    B: Tensor  # (b, l, g, n)
    C: Tensor  # (b, l, g, n)
    D: Tensor | None  # (h,) or (h, p)
    z: Tensor | None  # (b, l, e)
    dt_bias: Tensor | None  # (h,)
    initial: Tensor | None  # (n_states, h, p, n)
    segments: Tensor | None  # (5, s)
    n_states: int
    softplus: bool
    low: float
    high: float

    def for_core(self) -> tuple[Any, ...]:
        """As the core takes them."""
        *tensors, initial = (handed(tensor) for tensor in self[:9])
        options = (self.softplus, (self.low, self.high), initial, self.segments)
        return *tensors, *options, self.n_states, False


def _allocate(inputs: _Inputs) -> tuple[Tensor, Tensor]:
    """y and the last states."""
    (_, _, e), h = inputs.x.shape, inputs.A.shape[0]
    shape = (inputs.n_states, h, e // h, inputs.B.shape[-1])
    return inputs.x.new_empty(inputs.x.shape), inputs.x.new_empty(shape, dtype=torch.float32)


def _forward(inputs: _Inputs, outputs: tuple[Tensor, Tensor]) -> None:
    core().ssd(*inputs.for_core(), *outputs)


def _backward(
    inputs: _Inputs, _: Sequence[Tensor], dy: Tensor, dlast: Tensor | None, gradients: Any
) -> None:
    given = (dy.detach(), None if dlast is None else dlast.detach().contiguous())
    core().ssd_backward(*inputs.for_core(), *given, *gradients)


def _reference(inputs: _Inputs) -> tuple[Tensor, Tensor]:
    x, dt, A, B, C, D, z, dt_bias, initial, table, n_states, softplus, low, high = inputs
    x_blhp, z_blhp = (None if t is None else t.unflatten(2, (A.shape[0], -1)) for t in (x, z))
    assert x_blhp is not None
    tensors = (x_blhp, dt, A, B, C, D, z_blhp, dt_bias, softplus, (low, high), initial)
    y, last = chunked.ssd(SsdArguments(*tensors, True, segments_from_table(table, n_states)))
    return y.flatten(2), last


_ssd = Recurrence(
    "ssd",
    _Inputs,
    allocate=_allocate,
    forward=_forward,
    backward=_backward,
    reference=_reference,
    in_float32=("B", "C"),  # which are summed over heads
).operator


def _step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
) -> Tensor:
    y = x.new_empty(x.shape)
    inputs = [handed(t) for t in (state, x, dt, A, B, C, D, z, dt_bias)]
    core().ssd_step(*inputs, softplus, (low, high), handed(y))
    return y


_ssd_step = define_update("ssd_state_update", _step, state=0, x=1)
