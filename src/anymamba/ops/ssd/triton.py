"""The state space duality on a GPU through Triton's kernels, as PyTorch operators.

What is not finite in x reaches the whole chunk of its channel, earlier steps too, as it does in
`anymamba.ops.ssd.chunked`: matrix products multiply it by the zeros of the decays there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anymamba.ops.custom_operator import Recurrence, define_update
from anymamba.ops.flops import register_flops
from anymamba.ops.native import in_float32, segment_table
from anymamba.ops.segments import count_states, segments_from_table
from anymamba.ops.ssd import chunked
from anymamba.ops.ssd import triton_backward_kernels as backward_kernels
from anymamba.ops.ssd.arguments import SsdArguments, SsdStepArguments
from anymamba.ops.ssd.triton_chunks import BACKWARD_STEPS, FORWARD_STEPS, MOST_HEADS, Chunks, Inputs
from anymamba.ops.ssd.triton_kernels import outputs_kernel, step_kernel
from anymamba.ops.triton import on_device_of, strides, tile_side

# How many programs the sums over heads are shared out to: some for each multiprocessor.
_PROGRAMS = 512


def ssd(arguments: SsdArguments) -> tuple[Tensor, Tensor]:
    """Arguments and returns as in `anymamba.ops.ssd`; chunks have a length of the kernels' own."""
    x, dt, A, B, C, D, z, dt_bias, softplus, (low, high), initial, _, segments, _ = arguments
    table, n_states = segment_table(segments), count_states(segments, x.shape[0])
    D_hp, bias = _of_channels(in_float32(D), x), in_float32(dt_bias)
    tensors = (x, dt, in_float32(A), B, C, D_hp, z, bias, initial)
    y, last = _ssd(*tensors, table, n_states, softplus, low, high)
    return y, last


@torch.no_grad()
def ssd_state_update(arguments: SsdStepArguments) -> Tensor:
    """Arguments and returns as in `anymamba.ops.ssd_state_update`."""
    x, dt, A, B, C, D, z, dt_bias, softplus, (low, high), state = arguments
    D_hp, bias = _of_channels(in_float32(D), x), in_float32(dt_bias)
    tensors = (state, x, dt, in_float32(A), B, C, D_hp, z, bias)
    y: Tensor = _ssd_step(*tensors, softplus, low, high)
    return y


def _of_channels(D: Tensor | None, x: Tensor) -> Tensor | None:
    """D as (h, p), a view."""
    return D if D is None or D.ndim == 2 else D[:, None].expand(x.shape[-2:])


def _allocate(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """y and the last states."""
    x = inputs.x
    shape = (inputs.n_states, *x.shape[2:], inputs.B.shape[-1])
    return x.new_empty(x.shape), x.new_empty(shape, dtype=torch.float32)


def _forward(inputs: Inputs, outputs: tuple[Tensor, Tensor]) -> None:
    x, C, D, z = inputs.x, inputs.C, inputs.D, inputs.z
    y, last = outputs
    with on_device_of(x):
        chunks = Chunks(inputs, FORWARD_STEPS)
        states = chunks.states_before(in_float32(inputs.initial), last)
        h, p = chunks.h, chunks.p
        tiles = -(-p // chunks.P) * (chunks.Q // chunks.T)
        outputs_kernel[chunks.count, h, tiles](
            x, *x.stride(), C, *C.stride(), z, *strides(z, 4), D, *strides(D, 2),
            chunks.steps, chunks.scores, states, chunks.table, y,
            chunks.per_row, chunks.l, h, p, chunks.n, chunks.heads_per_group,
            T=chunks.T, P=chunks.P, N=chunks.N, **chunks.options,
        )  # fmt: skip


def _backward(
    inputs: Inputs, _: Sequence[Tensor], dy: Tensor, dlast: Tensor | None, gradients: Any
) -> None:
    dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial = gradients
    with on_device_of(inputs.x):
        chunks = Chunks(inputs, BACKWARD_STEPS)
        states = chunks.states_before(in_float32(inputs.initial), None)
        dstates = chunks.gradients_behind(dy, in_float32(dlast), dinitial)
        dsteps = _backward_of_heads(chunks, dy, states, dstates, dx, dz, dD)
        _backward_of_steps(chunks, dsteps, ddt, dA, dbias)
        _backward_of_maps(chunks, dy, states, dstates, dB, dC)


def _backward_of_heads(
    chunks: Chunks,
    dy: Tensor,
    states: Tensor,
    dstates: Tensor,
    dx: Tensor,
    dz: Tensor | None,
    dD: Tensor | None,
) -> Tensor:
    """Fill the gradients that belong to a head; returns those of the steps, in parts."""
    x, _, _, B, C, D, z = chunks.inputs[:7]
    h, p = chunks.h, chunks.p
    dD_chp = None if dD is None else chunks.buffer(chunks.count, h, p)
    dsteps = chunks.buffer(chunks.count, h, 2, chunks.Q)
    backward_kernels.heads_kernel[chunks.count, h](
        x, *x.stride(), B, *B.stride(), C, *C.stride(), z, *strides(z, 4), D, *strides(D, 2),
        dy, *dy.stride(), chunks.steps, chunks.scores, states, dstates, chunks.table,
        dx, dz, dD_chp, dsteps,
        chunks.per_row, chunks.l, h, p, chunks.n, chunks.heads_per_group,
        **chunks.backward_sides(), **chunks.options,
    )  # fmt: skip
    if dD is not None and dD_chp is not None:
        dD.copy_(dD_chp.sum(0))
    return dsteps


def _backward_of_steps(
    chunks: Chunks, dsteps: Tensor, ddt: Tensor, dA: Tensor, dbias: Tensor | None
) -> None:
    dt, A, bias = chunks.inputs.dt, chunks.inputs.A, chunks.inputs.dt_bias
    softplus, low, high = chunks.inputs[-3:]
    h, H = chunks.h, tile_side(chunks.h, MOST_HEADS)
    dA_ch, dbias_ch = (chunks.buffer(chunks.count, h) for _ in range(2))
    backward_kernels.dt_kernel[chunks.count, -(-h // H)](
        dt, *dt.stride(), A, bias, chunks.table, dsteps, ddt, dA_ch, dbias_ch,
        chunks.per_row, chunks.l, h, low, high,
        SOFTPLUS=softplus, Q=chunks.Q, H=H,
    )  # fmt: skip
    dA.copy_(dA_ch.sum(0))
    if dbias is not None:
        dbias.copy_(dbias_ch.sum(0))


def _backward_of_maps(
    chunks: Chunks, dy: Tensor, states: Tensor, dstates: Tensor, dB: Tensor, dC: Tensor
) -> None:
    """The gradients of B and C: sums over the heads of a group, shared out to some programs."""
    x, _, _, B, C, _, z = chunks.inputs[:7]
    sides, g, j = chunks.backward_sides(), chunks.g, chunks.heads_per_group
    tiles = -(-chunks.n // sides["N"])
    parts = min(j, -(-_PROGRAMS // (chunks.count * g * tiles)))
    heads = -(-j // parts)
    parts = -(-j // heads)
    sums = [chunks.buffer(parts, chunks.b, chunks.l, g, chunks.n) for _ in range(2)]
    backward_kernels.maps_kernel[chunks.count, g * parts, tiles](
        x, *x.stride(), B, *B.stride(), C, *C.stride(), z, *strides(z, 4), dy, *dy.stride(),
        chunks.steps, states, dstates, chunks.table, *sums,
        chunks.per_row, chunks.l, chunks.b, chunks.h, chunks.p, chunks.n, g, j, heads,
        **sides, **chunks.options,
    )  # fmt: skip
    dB.copy_(sums[0].sum(0))
    dC.copy_(sums[1].sum(0))


def _reference(inputs: Inputs) -> tuple[Tensor, Tensor]:
    x, dt, A, B, C, D, z, dt_bias, initial, table, n_states, softplus, low, high = inputs
    segments = segments_from_table(table, n_states)
    options = (softplus, (low, high), initial, True, segments)
    return chunked.ssd(SsdArguments(x, dt, A, B, C, D, z, dt_bias, *options))


_ssd = Recurrence(
    "ssd_triton",
    Inputs,
    allocate=_allocate,
    forward=_forward,
    backward=_backward,
    reference=_reference,
    device_types=None,
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
    y = torch.empty_like(x)
    (b, h, p), (g, n) = x.shape, B.shape[1:]
    P, N = tile_side(p, 16), tile_side(n, 128)
    with on_device_of(x):
        step_kernel[b, h, -(-p // P)](
            state, *state.stride(), x, *x.stride(), dt, *dt.stride(), A, B, *B.stride(),
            C, *C.stride(), D, *strides(D, 2), z, *strides(z, 3), dt_bias, y, *y.stride(),
            h, p, n, h // g, low, high,
            SOFTPLUS=softplus, P=P, N=N,
        )  # fmt: skip
    return y


_ssd_step = define_update("ssd_state_update_triton", _step, state=0, x=1, device_types=None)
register_flops("_triton")
