"""The selective scan on a GPU through Triton kernels, as PyTorch operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anymamba.ops.custom_operator import Recurrence, define_update
from anymamba.ops.flops import register_flops
from anymamba.ops.native import in_float32
from anymamba.ops.scan.arguments import ScanArguments, StepArguments, in_groups
from anymamba.ops.scan.operator import ScanInputs, by_reference, call
from anymamba.ops.scan.triton_backward_kernels import (
    scan_backward_kernel,
    split_gradients_kernel,
    unpack_map_gradients_kernel,
)
from anymamba.ops.scan.triton_kernels import (
    join_splits_kernel,
    pack_maps_kernel,
    scan_kernel,
    scan_step_kernel,
    split_ends_kernel,
)
from anymamba.ops.triton import (
    MOST_STATES,
    launch_options,
    on_device_of,
    strides,
    tile_side,
    wanted_programs,
)

# A warp's threads have a channel each, and the tile's steps in registers.
STEPS, CHANNELS = 16, 32
# What lets 16 programs run on a multiprocessor; the loop over states needs no more.
FORWARD_REGISTERS = 128
# So that kept states are few beside the inputs: one for 64 steps.
KEPT_CHUNKS = 4
JOINED_SPLITS = 32
STEP_TILE = 1024


def selective_scan(arguments: ScanArguments) -> tuple[Tensor, Tensor]:
    """Arguments and returns as in `anymamba.ops.selective_scan`."""
    return call(_scan, arguments)


@torch.no_grad()
def selective_state_update(arguments: StepArguments) -> Tensor:
    """Arguments and returns as in `anymamba.ops.selective_state_update`."""
    x_be, delta_be, A_en, B_bn, C_bn, D_e, z_be, delta_bias_e, softplus, state_ben = arguments
    y_be: Tensor = _scan_step(
        state_ben,
        x_be,
        delta_be,
        in_float32(A_en),
        *in_groups(B_bn, C_bn, x_be.ndim),
        in_float32(D_e),
        z_be,
        in_float32(delta_bias_e),
        softplus,
    )
    return y_be


class _Plan(NamedTuple):
    """How a call is cut into chunks of T steps, splits of chunks and blocks of channels."""

    T: int
    E: int
    chunk_table: Tensor | None  # (3, chunks): row, position of the first step, steps
    split_table: Tensor | None  # (5, splits): first chunk, chunks, state in, out, first kept one
    segment_table: Tensor | None  # (4, s): first split, splits, states that go in and come out
    chunks: int
    splits: int
    segments: int
    chunks_per_row: int
    splits_per_row: int
    chunks_per_split: int
    blocks: int
    blocks_per_group: int
    is_joined: bool  # whether a segment consists of several splits, whose states are joined


def _tile(inputs: ScanInputs) -> tuple[int, int]:
    """The steps and channels of a tile."""
    (_, l, e), groups = inputs.x.shape, inputs.B.shape[2]
    return tile_side(l, STEPS), tile_side(e // groups, CHANNELS)


def _plan(inputs: ScanInputs) -> _Plan:
    (b, l, e), groups = inputs.x.shape, inputs.B.shape[2]
    T, E = _tile(inputs)
    blocks_per_group = -(-(e // groups) // E)
    blocks = groups * blocks_per_group
    segments = b if inputs.segments is None else inputs.segments.shape[1]
    chunks_per_row = -(-l // T)
    wanted = -(-wanted_programs(inputs.x.device) // (segments * blocks))
    chunks_per_split = KEPT_CHUNKS * max(1, -(-chunks_per_row // (wanted * KEPT_CHUNKS)))
    splits_per_row = -(-chunks_per_row // chunks_per_split)
    per_row = (chunks_per_row, splits_per_row, chunks_per_split)
    if inputs.segments is None:
        none, counts = (None, None, None), (b * chunks_per_row, b * splits_per_row, b)
        is_joined = splits_per_row > 1
        return _Plan(T, E, *none, *counts, *per_row, blocks, blocks_per_group, is_joined)
    values = tuple(map(tuple, inputs.segments.tolist()))
    cut = (T, chunks_per_split, KEPT_CHUNKS, inputs.reverse)
    tables = _tables(values, *cut, inputs.x.device)
    counts = (tables[0].shape[1], tables[1].shape[1], tables[2].shape[1])
    longest = (inputs.segments[2] - inputs.segments[1]).amax()
    is_joined = bool(longest > chunks_per_split * T)
    return _Plan(T, E, *tables, *counts, *per_row, blocks, blocks_per_group, is_joined)


@lru_cache(maxsize=8)
def _tables(
    segments: tuple[tuple[int, ...], ...],
    T: int,
    chunks_per_split: int,
    kept_chunks: int,
    reverse: bool,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """The tables of chunks, splits and segments (`_Plan`) of a packed batch.

    The host waits for their copy to the device. So those of the last batches stay there: one copy
    serves all layers, and the backward pass.
    """
    rows, starts, stops, state_in, state_out = torch.tensor(segments)
    chunk_counts = -(-(stops - starts) // T)
    chunk_firsts, of_chunk, walked = _cut(chunk_counts)
    steps = (stops - starts)[of_chunk] - walked * T
    position = starts[of_chunk] + walked * T
    if reverse:
        position = stops[of_chunk] - 1 - walked * T
    chunks = torch.stack([rows[of_chunk], position, steps.clamp(max=T)])

    split_counts = -(-chunk_counts // chunks_per_split)
    split_firsts, of_split, walked = _cut(split_counts)
    first = chunk_firsts[of_split] + walked * chunks_per_split
    count = (chunk_counts[of_split] - walked * chunks_per_split).clamp(max=chunks_per_split)
    kept_counts = -(-count // kept_chunks)
    first_kept = kept_counts.cumsum(0) - kept_counts
    splits = torch.stack([first, count, state_in[of_split], state_out[of_split], first_kept])

    whole = torch.stack([split_firsts, split_counts, state_in, state_out])
    tables = [table.to(torch.int64).flatten() for table in (chunks, splits, whole)]
    parts = torch.cat(tables).to(device).split([len(table) for table in tables])
    return parts[0].view(3, -1), parts[1].view(5, -1), parts[2].view(4, -1)


def _cut(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first part of each whole; of each part, its whole and how many come before it there."""
    firsts = counts.cumsum(0) - counts
    wholes = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return firsts, wholes, torch.arange(len(wholes)) - firsts[wholes]


def _most_kept(inputs: ScanInputs) -> int:
    """At least the number of states that are kept for the backward pass, by the shapes alone.

    Two at least: a compiler makes another graph for a size of 1.
    """
    (b, l, _), steps = inputs.x.shape, STEPS * KEPT_CHUNKS
    if inputs.segments is None:
        return b * (-(-l // steps)) + 1
    return b * l // steps + inputs.segments.shape[1] + 1


def _allocate(inputs: ScanInputs) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last states, and those kept on the way (empty unless a backward pass comes)."""
    x, (e, n) = inputs.x, inputs.A.shape
    last = x.new_empty((inputs.n_states, e, n), dtype=torch.float32)
    kept = _most_kept(inputs) if inputs.will_go_back else 0
    return torch.empty_like(x), last, x.new_empty((kept, n, e), dtype=torch.float32)


def _forward(inputs: ScanInputs, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
    y, last, kept = outputs
    x, delta, A, _, _, D, z, delta_bias, initial = inputs[:9]
    if x.numel() == 0:
        _carry_over(last, initial)
        return
    plan = _plan(inputs)
    with on_device_of(x):
        B, C = (_pack(maps, inputs, plan) for maps in (inputs.B, inputs.C))
        if plan.segment_table is not None:
            _carry_over(last, initial)
        entering = None
        if plan.is_joined:
            ends, sums = _split_buffers(inputs, plan)
            split_ends_kernel[(plan.splits * plan.blocks,)](
                *(x, delta, A, B, delta_bias, ends, sums, plan.chunk_table, plan.split_table),
                *_sizes(inputs, plan),
                *(*x.stride(), *delta.stride()),
                **_options(inputs, plan),
            )
            entering = _join(inputs, plan, ends, sums, (initial, last), backward=False)
        scan_kernel[(plan.splits * plan.blocks,)](
            *(x, delta, A, B, C, D, z, delta_bias, y),
            *(_states(inputs, 2 * plan.splits), kept if inputs.will_go_back else None),
            *(entering, initial, last),
            *(plan.chunk_table, plan.split_table, *_sizes(inputs, plan)),
            *(*x.stride(), *delta.stride(), *strides(z, 3), *y.stride()),
            JOINED=plan.is_joined,
            K=KEPT_CHUNKS,
            **_options(inputs, plan, FORWARD_REGISTERS),
        )


def _backward(
    inputs: ScanInputs, kept: Sequence[Tensor], dy: Tensor, dlast: Tensor | None, gradients: Any
) -> None:
    x, delta, A, _, _, D, z, delta_bias, _ = inputs[:9]
    dx, ddelta, dA, dB, dC, dD, dz, dbias, dinitial = gradients
    dlast = in_float32(dlast)
    if dinitial is not None and (inputs.segments is not None or x.numel() == 0):
        _carry_over(dinitial, dlast)
    if x.numel() == 0:
        for gradient in (dA, dD, dbias):
            if gradient is not None:
                gradient.zero_()
        return
    plan = _plan(inputs)
    with on_device_of(x):
        B, C = (_pack(maps, inputs, plan) for maps in (inputs.B, inputs.C))
        leaving = None
        if plan.is_joined:
            ends, sums = _split_buffers(inputs, plan)
            split_gradients_kernel[(plan.splits * plan.blocks,)](
                *(delta, A, C, z, delta_bias, dy, ends, sums, plan.chunk_table, plan.split_table),
                *_sizes(inputs, plan),
                *(*delta.stride(), *strides(z, 3), *dy.stride()),
                **_options(inputs, plan),
            )
            leaving = _join(inputs, plan, ends, sums, (dlast, dinitial), backward=True)
        by_state = _states(inputs, plan.splits).zero_()
        by_map = x.new_empty((2, plan.blocks_per_group, *B.shape), dtype=torch.float32)
        by_channel = x.new_empty((2, plan.splits, x.shape[2]), dtype=torch.float32)
        scan_backward_kernel[(plan.splits * plan.blocks,)](
            *(x, delta, A, B, C, D, z, delta_bias, dy, kept[0]),
            *(_states(inputs, KEPT_CHUNKS * plan.splits), _states(inputs, 2 * plan.splits)),
            *(leaving, dlast),
            *(dx, ddelta, dz, dinitial, by_state, *by_map, *by_channel),
            *(plan.chunk_table, plan.split_table, *_sizes(inputs, plan)),
            *(*x.stride(), *delta.stride(), *strides(z, 3), *dy.stride(), *dx.stride()),
            JOINED=plan.is_joined,
            K=KEPT_CHUNKS,
            **_options(inputs, plan),
        )
        dA.copy_(by_state.sum(0).T)
        for total, parts in ((dB, by_map[0]), (dC, by_map[1])):
            _unpack(parts, total, inputs, plan)
        for total, parts in ((dD, by_channel[0]), (dbias, by_channel[1])):
            if total is not None:
                torch.sum(parts, 0, out=total)


def _sizes(inputs: ScanInputs, plan: _Plan) -> tuple[int, ...]:
    """The numbers that all kernels over tiles take."""
    (_, l, e), groups = inputs.x.shape, inputs.B.shape[2]
    per_row = (plan.chunks_per_row, plan.splits_per_row, plan.chunks_per_split)
    blocks = (groups, plan.blocks, plan.blocks_per_group, e // groups)
    return plan.chunks, plan.splits, l, *per_row, e, *blocks


def _options(inputs: ScanInputs, plan: _Plan, registers: int | None = None) -> dict[str, Any]:
    """What all kernels over tiles are compiled for."""
    compiled = {"N": inputs.A.shape[1], "SOFTPLUS": inputs.softplus, "REVERSE": inputs.reverse}
    return compiled | {"T": plan.T, "E": plan.E} | launch_options(1, registers)


def _pack(maps: Tensor, inputs: ScanInputs, plan: _Plan) -> Tensor:
    """B or C as the kernels read it, (chunks, g, n, T)."""
    groups, n = maps.shape[2:]
    packed = maps.new_empty((plan.chunks, groups, n, plan.T), dtype=torch.float32)
    pack_maps_kernel[(plan.chunks * groups,)](
        *(maps, packed, plan.chunk_table, plan.chunks, maps.shape[1], plan.chunks_per_row, groups),
        *maps.stride(),
        N=n,
        PADDED_N=tile_side(n, MOST_STATES),
        REVERSE=inputs.reverse,
        T=plan.T,
        **launch_options(1),
    )
    return packed


def _unpack(parts: Tensor, total: Tensor, inputs: ScanInputs, plan: _Plan) -> None:
    """The blocks' parts of dB or dC, (blocks per group, chunks, g, n, T), added up."""
    groups, n = total.shape[2:]
    unpack_map_gradients_kernel[(plan.chunks * groups,)](
        *(parts, total, plan.chunk_table, plan.chunks, total.shape[1], plan.chunks_per_row),
        *(groups, plan.blocks_per_group),
        N=n,
        PADDED_N=tile_side(n, MOST_STATES),
        REVERSE=inputs.reverse,
        T=plan.T,
        **launch_options(1),
    )


def _join(
    inputs: ScanInputs,
    plan: _Plan,
    ends: Tensor,
    sums: Tensor,
    first_and_last: tuple[Tensor | None, Tensor | None],
    *,
    backward: bool,
) -> Tensor:
    """What each split begins with, (splits, n, e): its first state, or the gradient of its last."""
    e, n = inputs.A.shape
    E = tile_side(e, CHANNELS)
    blocks = -(-e // E)
    starts = torch.empty_like(ends)
    join_splits_kernel[(plan.segments * n * blocks,)](
        *(ends, sums, inputs.A, starts, *first_and_last, plan.segment_table),
        *(plan.segments, plan.splits_per_row, e, blocks),
        N=n,
        BACKWARD=backward,
        K=JOINED_SPLITS,
        E=E,
        **launch_options(1),
    )
    return starts


def _states(inputs: ScanInputs, slots: int) -> Tensor:
    e, n = inputs.A.shape
    return inputs.x.new_empty((slots, n, e), dtype=torch.float32)


def _split_buffers(inputs: ScanInputs, plan: _Plan) -> tuple[Tensor, Tensor]:
    """What splits add to the state, (splits, n, e), and their sums of step sizes, (splits, e)."""
    sums = inputs.x.new_empty((plan.splits, inputs.x.shape[2]), dtype=torch.float32)
    return _states(inputs, plan.splits).zero_(), sums


def _carry_over(after: Tensor, before: Tensor | None) -> None:
    """States that no segment reaches come out as they went in."""
    if before is None:
        after.zero_()
    else:
        after.copy_(before)


_scan = Recurrence(
    "selective_scan_triton",
    ScanInputs,
    allocate=_allocate,
    forward=_forward,
    backward=_backward,
    reference=by_reference,
    in_float32=("B", "C"),  # which are summed over channels
    device_types=None,
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
    if x.numel() == 0:
        return y
    (b, e), n = x.shape, A.shape[1]
    padded_n = tile_side(n, math.inf)
    E = tile_side(e, max(1, STEP_TILE // padded_n))
    blocks = -(-e // E)
    with on_device_of(x):
        scan_step_kernel[(b * blocks,)](
            *(state, x, delta, A, B, C, D, z, delta_bias, y, e, blocks, e // B.shape[1]),
            *(*state.stride(), *x.stride(), *delta.stride(), *B.stride(), *C.stride()),
            *(*strides(z, 2), *y.stride()),
            N=n,
            SOFTPLUS=softplus,
            E=E,
            PADDED_N=padded_n,
            **launch_options(4),
        )
    return y


_scan_step = define_update("selective_state_update_triton", _step, state=0, x=1, device_types=None)
register_flops("_triton")
