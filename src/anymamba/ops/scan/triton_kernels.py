"""The selective scan's forward kernels in Triton, and what its backward kernels share with them.

A program takes a block of channels through a split (a segment, or a part of it), a tile of T steps
and E channels at a time, one state n after the other. Strides of channels are not specialized for,
so that a thread has one channel and all steps of a tile in its registers. `associative_scan` is
then a loop in each thread, without any exchange between threads, and no tensor with an axis for the
states is ever in memory. Kept for the backward pass is the state before every K-th tile, or chunk,
from which it computes the others again.

Where rows and channels are too few to fill the device, segments are cut into several splits, in
three passes: each split's last state from a zero state (`split_ends_kernel`), the states at the
borders of splits from these (`join_splits_kernel`), and the outputs (`scan_kernel`).

Letters as everywhere: t a step of the chunk, e a channel, n a state.
"""

import triton
import triton.language as tl

from anymamba.ops.triton_functions import silu, softplus

SIZES = ["chunks", "splits", "segments", "length", "chunks_per_row", "splits_per_row"]
SIZES += ["chunks_per_split"]
"""What differs from call to call: kernels that were compiled for one length serve all."""
CHANNEL_STRIDES = ["x_e", "delta_e", "z_e", "y_e", "dy_e", "dense_e"]
"""Known to be 1, they would have Triton give each thread several neighbouring channels."""
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
"""exp(x) is exp2(x log2(e)), and exp2 is what GPUs have an instruction for."""


@triton.jit
def compose(decay, state, next_decay, next_state):
    """Two steps of h -> decay h + state, taken as one."""
    return decay * next_decay, next_decay * state + next_state


@triton.jit
def block_of_channels(block, blocks_per_group, group_channels, E: tl.constexpr):
    """The group of a block of channels, its first channel, and which of its channels exist."""
    group = block // blocks_per_group
    in_group = (block % blocks_per_group) * E
    exists_e = in_group + tl.arange(0, E) < group_channels
    return group.to(tl.int64), (group * group_channels + in_group).to(tl.int64), exists_e


@triton.jit
def chunk_bounds(
    chunk, chunk_table, chunks, length, chunks_per_row, REVERSE: tl.constexpr, T: tl.constexpr
):
    """Where a chunk lies: its row, the position of its first step, and how many steps it has."""
    if chunk_table is None:
        row = chunk // chunks_per_row
        walked = (chunk % chunks_per_row) * T
        steps = tl.minimum(length - walked, T)
        position = length - 1 - walked if REVERSE else walked
    else:
        row = tl.load(chunk_table + chunk)
        position = tl.load(chunk_table + chunks + chunk)
        steps = tl.load(chunk_table + 2 * chunks + chunk)
    return row.to(tl.int64), position.to(tl.int64), steps


@triton.jit
def split_bounds(
    split, split_table, splits, splits_per_row, chunks_per_split, chunks_per_row, K: tl.constexpr
):
    """A split's first chunk, how many it has, the places of its segment's first and last state, and
    of the first state that it keeps: one for K chunks.
    """
    if split_table is None:
        row, walked = split // splits_per_row, (split % splits_per_row) * chunks_per_split
        first = row * chunks_per_row + walked
        count = tl.minimum(chunks_per_row - walked, chunks_per_split)
        state_in, state_out = row, row
        kept = row * tl.cdiv(chunks_per_row, K) + walked // K
    else:
        first = tl.load(split_table + split).to(tl.int32)
        count = tl.load(split_table + splits + split).to(tl.int32)
        state_in = tl.load(split_table + 2 * splits + split).to(tl.int32)
        state_out = tl.load(split_table + 3 * splits + split).to(tl.int32)
        kept = tl.load(split_table + 4 * splits + split).to(tl.int32)
    return first, count, state_in, state_out, kept


@triton.jit
def segment_bounds(segment, segment_table, segments, splits_per_row):
    """A segment's first split and how many it has, and the states that go in and come out."""
    if segment_table is None:
        first, count, state_in, state_out = (
            segment * splits_per_row,
            splits_per_row,
            segment,
            segment,
        )
    else:
        first = tl.load(segment_table + segment).to(tl.int32)
        count = tl.load(segment_table + segments + segment).to(tl.int32)
        state_in = tl.load(segment_table + 2 * segments + segment).to(tl.int32)
        state_out = tl.load(segment_table + 3 * segments + segment).to(tl.int32)
    return first, count, state_in, state_out


@triton.jit
def load_tile(tensor, row, position, channel, stride_b, stride_l, stride_e, inside_te, STEP, T, E):
    """A tile of a (b, l, e) tensor as float32, zeros outside."""
    corner = tensor + row * stride_b + position * stride_l + channel * stride_e
    t, e = tl.arange(0, T), tl.arange(0, E)
    places = (t * STEP * stride_l)[:, None] + (e * stride_e)[None, :]
    return tl.load(corner + places, mask=inside_te, other=0.0).to(tl.float32)


@triton.jit
def store_tile(
    tensor, tile_te, row, position, channel, stride_b, stride_l, stride_e, inside_te, STEP, T, E
):
    corner = tensor + row * stride_b + position * stride_l + channel * stride_e
    t, e = tl.arange(0, T), tl.arange(0, E)
    places = (t * STEP * stride_l)[:, None] + (e * stride_e)[None, :]
    tl.store(corner + places, tile_te.to(tensor.dtype.element_ty), mask=inside_te)


@triton.jit
def step_sizes(raw_te, delta_bias, channel, exists_e, inside_te, SOFTPLUS: tl.constexpr, E):
    """The step sizes from delta before bias and softplus, which comes back with its bias.

    Outside of the tile they are zero: such a step leaves the state as it is.
    """
    if delta_bias is not None:
        bias_e = tl.load(delta_bias + channel + tl.arange(0, E), mask=exists_e, other=0.0)
        raw_te += bias_e[None, :].to(tl.float32)
    delta_te = softplus(raw_te) if SOFTPLUS else raw_te
    return tl.where(inside_te, delta_te, 0.0), raw_te


@triton.jit
def load_map(maps, chunk, groups, group, n, N: tl.constexpr, T: tl.constexpr):
    """One state's entries of B or C at all steps of a chunk, as `pack_maps_kernel` wrote them."""
    line = (chunk.to(tl.int64) * groups + group) * N + n
    return tl.load(maps + line * T + tl.arange(0, T))


@triton.jit(do_not_specialize=SIZES)
def pack_maps_kernel(
    maps, packed, chunk_table, chunks, length, chunks_per_row, groups,
    stride_b, stride_l, stride_g, stride_n,
    N: tl.constexpr, PADDED_N: tl.constexpr, REVERSE: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """B or C, (b, l, g, n), as (chunks, g, n, T) in float32: a chunk's steps side by side.

    The other kernels read the entries of one state at a time, from the caches.
    """
    chunk, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    row, position, steps = chunk_bounds(
        chunk, chunk_table, chunks, length, chunks_per_row, REVERSE, T
    )
    STEP: tl.constexpr = -1 if REVERSE else 1
    t, n = tl.arange(0, T), tl.arange(0, PADDED_N)
    corner = maps + row * stride_b + position * stride_l + group.to(tl.int64) * stride_g
    places = (t * STEP * stride_l)[:, None] + (n * stride_n)[None, :]
    inside_tn = (t < steps)[:, None] & (n < N)[None, :]
    tile_tn = tl.load(corner + places, mask=inside_tn, other=0.0).to(tl.float32)
    line = (chunk.to(tl.int64) * groups + group) * N
    tl.store(packed + (line + n)[None, :] * T + t[:, None], tile_tn, mask=(n < N)[None, :])


@triton.jit
def load_state(states, slot, n, channels, e, exists_e, N: tl.constexpr):
    """The states n of a block of channels from (slots, n, e)."""
    return tl.load(states + (slot * N + n) * channels + e, mask=exists_e, other=0.0)


@triton.jit
def store_state(states, state_e, slot, n, channels, e, exists_e, N: tl.constexpr):
    tl.store(states + (slot * N + n) * channels + e, state_e, mask=exists_e)


@triton.jit(do_not_specialize=SIZES + CHANNEL_STRIDES)
def split_ends_kernel(
    x, delta, A, B, delta_bias, ends, sums, chunk_table, split_table,
    chunks, splits, length, chunks_per_row, splits_per_row, chunks_per_split,
    channels, groups, blocks, blocks_per_group, group_channels,
    x_b, x_l, x_e, delta_b, delta_l, delta_e,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, T: tl.constexpr,
    E: tl.constexpr,
):  # fmt: skip
    """The last state of each split from a zero state, and the sum of its step sizes.

    `ends` (splits, n, e) comes with zeros.
    """
    split = tl.program_id(0) // blocks
    group, channel, exists_e = block_of_channels(
        tl.program_id(0) % blocks, blocks_per_group, group_channels, E
    )
    STEP: tl.constexpr = -1 if REVERSE else 1
    e, t = channel + tl.arange(0, E), tl.arange(0, T)
    slot = split.to(tl.int64)
    chunk_0, count, _state_in, _state_out, _kept = split_bounds(
        split, split_table, splits, splits_per_row, chunks_per_split, chunks_per_row, 1
    )
    sum_e = tl.zeros([E], tl.float32)
    # From the last chunk to the first one: an input decays by the steps that come after it.
    for walked in range(count):
        chunk = chunk_0 + (count - 1 - walked)
        row, position, steps = chunk_bounds(
            chunk, chunk_table, chunks, length, chunks_per_row, REVERSE, T
        )
        inside_te = (t < steps)[:, None] & exists_e[None, :]
        x_te = load_tile(x, row, position, channel, x_b, x_l, x_e, inside_te, STEP, T, E)
        raw_te = load_tile(
            delta, row, position, channel, delta_b, delta_l, delta_e, inside_te, STEP, T, E
        )
        delta_te, raw_te = step_sizes(raw_te, delta_bias, channel, exists_e, inside_te, SOFTPLUS, E)
        drive_te = delta_te * x_te
        chunk_sum_e = tl.sum(delta_te, 0)
        after_te = (chunk_sum_e + sum_e)[None, :] - tl.cumsum(delta_te, 0)
        sum_e += chunk_sum_e
        for n in range(N):
            rate_e = tl.load(A + e * N + n, mask=exists_e, other=0.0) * LOG2_E
            b_t = load_map(B, chunk, groups, group, n, N, T)
            end_e = tl.sum(tl.exp2(after_te * rate_e[None, :]) * drive_te * b_t[:, None], 0)
            end_e += load_state(ends, slot, n, channels, e, exists_e, N)
            store_state(ends, end_e, slot, n, channels, e, exists_e, N)
        tl.debug_barrier()
    tl.store(sums + slot * channels + e, sum_e, mask=exists_e)


@triton.jit(do_not_specialize=SIZES)
def join_splits_kernel(
    ends, sums, A, starts, first, last, segment_table,
    segments, splits_per_row, channels, blocks,
    N: tl.constexpr, BACKWARD: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Carry states through the splits of a segment, K splits at a time, for one state n.

    `ends` is what each split adds and `starts` what it begins with, both (splits, n, e); `first`
    goes into a segment and `last` comes out, (s, e, n). BACKWARD carries gradients: from the last
    split to the first one.
    """
    block, n = tl.program_id(0) % blocks, tl.program_id(0) // blocks % N
    segment = tl.program_id(0) // blocks // N
    split_0, count, state_in, state_out = segment_bounds(
        segment, segment_table, segments, splits_per_row
    )
    enters = (state_out if BACKWARD else state_in).to(tl.int64)
    leaves = (state_in if BACKWARD else state_out).to(tl.int64)
    e, k = block * E + tl.arange(0, E), tl.arange(0, K)
    exists_e = e < channels
    rate_e = tl.load(A + e * N + n, mask=exists_e, other=0.0) * LOG2_E
    state_e = tl.zeros([E], tl.float32)
    if first is not None and enters >= 0:
        state_e = tl.load(first + (enters * channels + e) * N + n, mask=exists_e, other=0.0)
    for walked in range(0, count, K):
        order = walked + k
        split = (split_0 + (count - 1 - order if BACKWARD else order)).to(tl.int64)
        inside_ke = (order < count)[:, None] & exists_e[None, :]
        sum_ke = tl.load(sums + split[:, None] * channels + e[None, :], mask=inside_ke, other=0.0)
        places = (split[:, None] * N + n) * channels + e[None, :]
        end_ke = tl.load(ends + places, mask=inside_ke, other=0.0)
        decay_ke = tl.exp2(sum_ke * rate_e[None, :])
        end_ke = tl.where((k == 0)[:, None], end_ke + decay_ke * state_e[None, :], end_ke)
        _product_ke, after_ke = tl.associative_scan((decay_ke, end_ke), 0, compose)
        first_split = (split_0 + (count - 1 - walked if BACKWARD else walked)).to(tl.int64)
        store_state(starts, state_e, first_split, n, channels, e, exists_e, N)
        # What comes out of a split goes into the next one.
        next_split = -N * channels if BACKWARD else N * channels
        has_next = (order + 1 < count) & (k + 1 < K)
        tl.store(starts + places + next_split, after_ke, mask=has_next[:, None] & exists_e[None, :])
        state_e = tl.sum(tl.where((k == K - 1)[:, None], after_ke, 0.0), 0)
    if last is not None and leaves >= 0:
        tl.store(last + (leaves * channels + e) * N + n, state_e, mask=exists_e)


@triton.jit(do_not_specialize=SIZES + CHANNEL_STRIDES)
def scan_kernel(
    x, delta, A, B, C, D, z, delta_bias, y, starts, kept, entering, initial, last,
    chunk_table, split_table,
    chunks, splits, length, chunks_per_row, splits_per_row, chunks_per_split,
    channels, groups, blocks, blocks_per_group, group_channels,
    x_b, x_l, x_e, delta_b, delta_l, delta_e, z_b, z_l, z_e, y_b, y_l, y_e,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, JOINED: tl.constexpr,
    K: tl.constexpr, T: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """The outputs of a split.

    It starts from `entering` (splits, n, e) where splits were JOINED, else from the segment's
    initial state, and then writes the last one. `starts` (2 splits, n, e) takes the state from
    chunk to chunk, two slots of a split taking turns; for the backward pass every K-th goes into
    `kept`.
    """
    split = tl.program_id(0) // blocks
    group, channel, exists_e = block_of_channels(
        tl.program_id(0) % blocks, blocks_per_group, group_channels, E
    )
    STEP: tl.constexpr = -1 if REVERSE else 1
    e, t = channel + tl.arange(0, E), tl.arange(0, T)
    chunk_0, count, state_in, state_out, first_kept = split_bounds(
        split, split_table, splits, splits_per_row, chunks_per_split, chunks_per_row, K
    )
    for n in range(N):
        state_e = tl.zeros([E], tl.float32)
        if JOINED:
            state_e = load_state(entering, split.to(tl.int64), n, channels, e, exists_e, N)
        elif initial is not None and state_in >= 0:
            place = initial + (state_in.to(tl.int64) * channels + e) * N + n
            state_e = tl.load(place, mask=exists_e, other=0.0)
        if count > 0:
            store_state(starts, state_e, (2 * split).to(tl.int64), n, channels, e, exists_e, N)
    for walked in range(count):
        chunk = chunk_0 + walked
        slot = (2 * split + walked % 2).to(tl.int64)
        next_slot = (2 * split + (walked + 1) % 2).to(tl.int64)
        kept_slot = (first_kept + walked // K).to(tl.int64)
        # What other threads of this program have stored in `starts` is read now.
        tl.debug_barrier()
        row, position, steps = chunk_bounds(
            chunk, chunk_table, chunks, length, chunks_per_row, REVERSE, T
        )
        inside_te = (t < steps)[:, None] & exists_e[None, :]
        x_te = load_tile(x, row, position, channel, x_b, x_l, x_e, inside_te, STEP, T, E)
        raw_te = load_tile(
            delta, row, position, channel, delta_b, delta_l, delta_e, inside_te, STEP, T, E
        )
        delta_te, raw_te = step_sizes(raw_te, delta_bias, channel, exists_e, inside_te, SOFTPLUS, E)
        drive_te = delta_te * x_te
        y_te = tl.zeros([T, E], tl.float32)
        if D is not None:
            y_te += tl.load(D + e, mask=exists_e, other=0.0)[None, :] * x_te
        for n in range(N):
            rate_e = tl.load(A + e * N + n, mask=exists_e, other=0.0) * LOG2_E
            start_e = load_state(starts, slot, n, channels, e, exists_e, N)
            if kept is not None and walked % K == 0:
                store_state(kept, start_e, kept_slot, n, channels, e, exists_e, N)
            b_t = load_map(B, chunk, groups, group, n, N, T)
            c_t = load_map(C, chunk, groups, group, n, N, T)
            decay_te = tl.exp2(delta_te * rate_e[None, :])
            input_te = drive_te * b_t[:, None]
            input_te = tl.where((t == 0)[:, None], input_te + decay_te * start_e[None, :], input_te)
            _product_te, state_te = tl.associative_scan((decay_te, input_te), 0, compose)
            y_te += state_te * c_t[:, None]
            end_e = tl.sum(tl.where((t == T - 1)[:, None], state_te, 0.0), 0)
            if walked + 1 < count:
                store_state(starts, end_e, next_slot, n, channels, e, exists_e, N)
            elif not JOINED:
                if state_out >= 0:
                    place = last + (state_out.to(tl.int64) * channels + e) * N + n
                    tl.store(place, end_e, mask=exists_e)
        if z is not None:
            z_te = load_tile(z, row, position, channel, z_b, z_l, z_e, inside_te, STEP, T, E)
            y_te *= silu(z_te)
        store_tile(y, y_te, row, position, channel, y_b, y_l, y_e, inside_te, STEP, T, E)


@triton.jit
def scan_step_kernel(
    state, x, delta, A, B, C, D, z, delta_bias, y,
    channels, blocks, group_channels,
    state_b, state_e, state_n, x_b, x_e, delta_b, delta_e, B_b, B_g, B_n, C_b, C_g, C_n,
    z_b, z_e, y_b, y_e,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, E: tl.constexpr, PADDED_N: tl.constexpr,
):  # fmt: skip
    """One step of a row's block of channels: the state changes in place."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    e = ((tl.program_id(0) % blocks) * E + tl.arange(0, E)).to(tl.int64)
    n = tl.arange(0, PADDED_N)
    exists_e, exists_n = e < channels, n < N
    inside_en = exists_e[:, None] & exists_n[None, :]
    delta_e_ = tl.load(delta + row * delta_b + e * delta_e, mask=exists_e, other=0.0)
    delta_e_ = delta_e_.to(tl.float32)
    if delta_bias is not None:
        delta_e_ += tl.load(delta_bias + e, mask=exists_e, other=0.0)
    if SOFTPLUS:
        delta_e_ = softplus(delta_e_)
    x_e_ = tl.load(x + row * x_b + e * x_e, mask=exists_e, other=0.0).to(tl.float32)
    rate_en = tl.load(A + e[:, None] * N + n[None, :], mask=inside_en, other=0.0) * LOG2_E
    group = (e // group_channels)[:, None]
    b_en = tl.load(B + row * B_b + group * B_g + (n * B_n)[None, :], mask=inside_en, other=0.0)
    c_en = tl.load(C + row * C_b + group * C_g + (n * C_n)[None, :], mask=inside_en, other=0.0)
    places = state + row * state_b + (e * state_e)[:, None] + (n * state_n)[None, :]
    state_en = tl.load(places, mask=inside_en, other=0.0).to(tl.float32)
    state_en = state_en * tl.exp2(delta_e_[:, None] * rate_en)
    state_en += (delta_e_ * x_e_)[:, None] * b_en.to(tl.float32)
    tl.store(places, state_en.to(state.dtype.element_ty), mask=inside_en)
    y_e_ = tl.sum(state_en * c_en.to(tl.float32), 1)
    if D is not None:
        y_e_ += tl.load(D + e, mask=exists_e, other=0.0) * x_e_
    if z is not None:
        y_e_ *= silu(tl.load(z + row * z_b + e * z_e, mask=exists_e, other=0.0).to(tl.float32))
    tl.store(y + row * y_b + e * y_e, y_e_.to(y.dtype.element_ty), mask=exists_e)
