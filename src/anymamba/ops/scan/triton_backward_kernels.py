"""The selective scan's backward kernels in Triton; `triton_kernels.py` says how tiles are walked.

With v_t = C_t dy_t, the gradient of the state h_t is g_t = v_t + decay_{t+1} g_{t+1}: a scan from
the last step to the first one. States are computed again from those at the chunks' borders, so that
memory grows with l e, not with l e n.

Sums over channels (dB, dC) and over rows and steps (dA, dD, the step bias) leave a program as
partial sums, which are added afterwards in a fixed order. So the same call gives the same bits.
"""

import triton
import triton.language as tl

from anymamba.ops.scan.triton_kernels import (
    CHANNEL_STRIDES,
    LOG2_E,
    SIZES,
    block_of_channels,
    chunk_bounds,
    compose,
    load_map,
    load_state,
    load_tile,
    split_bounds,
    step_sizes,
    store_state,
    store_tile,
)
from anymamba.ops.triton_functions import sigmoid, silu, silu_derivative


@triton.jit
def compose_gradients(decay, factor, gradient, earlier_decay, earlier_factor, earlier_gradient):
    """The gradients of some steps and of the steps before them, as those of all.

    Of some steps in a row come the first one's decay, the product of the others' decays, and the
    gradient of the first one's state by all their outputs.
    """
    reaches = earlier_factor * decay
    return earlier_decay, reaches * factor, earlier_gradient + reaches * gradient


@triton.jit
def flip_steps(tile, T: tl.constexpr, E: tl.constexpr):
    """The steps of a tile the other way round, which only renames a thread's registers.

    `associative_scan` has an option to go backward, which exchanges numbers between threads.
    """
    for bit in tl.static_range(6):
        if (1 << bit) < T:
            halves = tl.reshape(tile, [T // (2 << bit), 2, 1 << bit, E])
            first, second = tl.split(tl.permute(halves, [0, 2, 3, 1]))
            tile = tl.reshape(tl.permute(tl.join(second, first), [0, 3, 1, 2]), [T, E])
    return tile


@triton.jit(do_not_specialize=SIZES + CHANNEL_STRIDES)
def split_gradients_kernel(
    delta, A, C, z, delta_bias, dy, ends, sums, chunk_table, split_table,
    chunks, splits, length, chunks_per_row, splits_per_row, chunks_per_split,
    channels, groups, blocks, blocks_per_group, group_channels,
    delta_b, delta_l, delta_e, z_b, z_l, z_e, dy_b, dy_l, dy_e,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, T: tl.constexpr,
    E: tl.constexpr,
):  # fmt: skip
    """The gradient of the state before each split, as far as the split's own outputs give it.

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
    for walked in range(count):
        chunk = chunk_0 + walked
        row, position, steps = chunk_bounds(
            chunk, chunk_table, chunks, length, chunks_per_row, REVERSE, T
        )
        inside_te = (t < steps)[:, None] & exists_e[None, :]
        raw_te = load_tile(
            delta, row, position, channel, delta_b, delta_l, delta_e, inside_te, STEP, T, E
        )
        delta_te, raw_te = step_sizes(raw_te, delta_bias, channel, exists_e, inside_te, SOFTPLUS, E)
        dy_te = load_tile(dy, row, position, channel, dy_b, dy_l, dy_e, inside_te, STEP, T, E)
        if z is not None:
            z_te = load_tile(z, row, position, channel, z_b, z_l, z_e, inside_te, STEP, T, E)
            dy_te *= silu(z_te)
        upto_te = sum_e[None, :] + tl.cumsum(delta_te, 0)
        sum_e += tl.sum(delta_te, 0)
        for n in range(N):
            rate_e = tl.load(A + e * N + n, mask=exists_e, other=0.0) * LOG2_E
            c_t = load_map(C, chunk, groups, group, n, N, T)
            end_e = tl.sum(tl.exp2(upto_te * rate_e[None, :]) * dy_te * c_t[:, None], 0)
            end_e += load_state(ends, slot, n, channels, e, exists_e, N)
            store_state(ends, end_e, slot, n, channels, e, exists_e, N)
        tl.debug_barrier()
    tl.store(sums + slot * channels + e, sum_e, mask=exists_e)


@triton.jit
def restore_starts(
    kept, starts, kept_slot, first_slot, first_chunk, count, x, delta, A, B, delta_bias,
    chunk_table, chunks, length, chunks_per_row, channels, groups, group, channel, exists_e,
    x_b, x_l, x_e, delta_b, delta_l, delta_e,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, T: tl.constexpr,
    E: tl.constexpr,
):  # fmt: skip
    """The state before a chunk that was kept, and from it those before the `count` next ones."""
    STEP: tl.constexpr = -1 if REVERSE else 1
    e, t = channel + tl.arange(0, E), tl.arange(0, T)
    # Until here other threads may read what is in `starts`.
    tl.debug_barrier()
    for n in range(N):
        start_e = load_state(kept, kept_slot, n, channels, e, exists_e, N)
        store_state(starts, start_e, first_slot, n, channels, e, exists_e, N)
    for walked in range(count):
        tl.debug_barrier()
        chunk = first_chunk + walked
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
        sum_e = tl.sum(delta_te, 0)
        after_te = sum_e[None, :] - tl.cumsum(delta_te, 0)
        for n in range(N):
            rate_e = tl.load(A + e * N + n, mask=exists_e, other=0.0) * LOG2_E
            b_t = load_map(B, chunk, groups, group, n, N, T)
            end_e = tl.sum(tl.exp2(after_te * rate_e[None, :]) * drive_te * b_t[:, None], 0)
            start_e = load_state(starts, first_slot + walked, n, channels, e, exists_e, N)
            end_e += tl.exp2(sum_e * rate_e) * start_e
            store_state(starts, end_e, first_slot + walked + 1, n, channels, e, exists_e, N)


@triton.jit(do_not_specialize=SIZES + CHANNEL_STRIDES)
def scan_backward_kernel(
    x, delta, A, B, C, D, z, delta_bias, dy, kept, starts, carried, leaving, dlast,
    dx, ddelta, dz, dinitial, partial_dA, partial_dB, partial_dC, partial_dD, partial_dbias,
    chunk_table, split_table,
    chunks, splits, length, chunks_per_row, splits_per_row, chunks_per_split,
    channels, groups, blocks, blocks_per_group, group_channels,
    x_b, x_l, x_e, delta_b, delta_l, delta_e, z_b, z_l, z_e, dy_b, dy_l, dy_e,
    dense_b, dense_l, dense_e,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, JOINED: tl.constexpr,
    K: tl.constexpr, T: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """All gradients of a split, from its last chunk to its first.

    The gradient of the split's last state by all that follows is in `leaving` (splits, n, e) where
    splits were JOINED, else it is the segment's of `dlast`. `carried` (2 splits, n, e) takes it
    from chunk to chunk, two slots of a split taking turns. `starts` (K splits, n, e) takes the
    states before K chunks, computed again from a `kept` one. partial_dA (splits, n, e) comes with
    zeros.
    """
    split = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    group, channel, exists_e = block_of_channels(block, blocks_per_group, group_channels, E)
    block_in_group = (block % blocks_per_group).to(tl.int64)
    STEP: tl.constexpr = -1 if REVERSE else 1
    e, t = channel + tl.arange(0, E), tl.arange(0, T)
    split_slot = split.to(tl.int64)
    chunk_0, count, state_in, state_out, first_kept = split_bounds(
        split, split_table, splits, splits_per_row, chunks_per_split, chunks_per_row, K
    )
    for n in range(N):
        gradient_e = tl.zeros([E], tl.float32)
        if JOINED:
            gradient_e = load_state(leaving, split_slot, n, channels, e, exists_e, N)
        elif dlast is not None and state_out >= 0:
            place = dlast + (state_out.to(tl.int64) * channels + e) * N + n
            gradient_e = tl.load(place, mask=exists_e, other=0.0)
        store_state(carried, gradient_e, 2 * split_slot, n, channels, e, exists_e, N)
    dD_e = tl.zeros([E], tl.float32)
    dbias_e = tl.zeros([E], tl.float32)
    for walked in range(count):
        from_first = count - 1 - walked
        chunk = chunk_0 + from_first
        if (walked == 0) | (from_first % K == K - 1):
            restore_starts(
                kept, starts, (first_kept + from_first // K).to(tl.int64), split_slot * K,
                chunk - from_first % K, from_first % K, x, delta, A, B, delta_bias, chunk_table,
                chunks, length, chunks_per_row, channels, groups, group, channel, exists_e,
                x_b, x_l, x_e, delta_b, delta_l, delta_e, N, SOFTPLUS, REVERSE, T, E,
            )  # fmt: skip
        start_slot = split_slot * K + from_first % K
        slot = (2 * split + walked % 2).to(tl.int64)
        next_slot = (2 * split + (walked + 1) % 2).to(tl.int64)
        # What other threads of this program have stored is read now.
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
        dy_te = load_tile(dy, row, position, channel, dy_b, dy_l, dy_e, inside_te, STEP, T, E)
        if z is not None:
            z_te = load_tile(z, row, position, channel, z_b, z_l, z_e, inside_te, STEP, T, E)
            dy_te *= silu(z_te)
        y_te = tl.zeros([T, E], tl.float32)
        ddrive_te = tl.zeros([T, E], tl.float32)
        ddelta_te = tl.zeros([T, E], tl.float32)
        # (blocks_per_group, chunks, g, n, T)
        line = ((block_in_group * chunks + chunk) * groups + group) * N
        for n in range(N):
            A_e = tl.load(A + e * N + n, mask=exists_e, other=0.0)
            start_e = load_state(starts, start_slot, n, channels, e, exists_e, N)
            after_e = load_state(carried, slot, n, channels, e, exists_e, N)
            b_t = load_map(B, chunk, groups, group, n, N, T)
            c_t = load_map(C, chunk, groups, group, n, N, T)

            decay_te = tl.exp2(delta_te * (A_e * LOG2_E)[None, :])
            own_te = drive_te * b_t[:, None]
            input_te = tl.where((t == 0)[:, None], own_te + decay_te * start_e[None, :], own_te)
            _product_te, state_te = tl.associative_scan((decay_te, input_te), 0, compose)
            # Steps outside of the sequence have decay 1 and pass on what comes in at the end.
            given_te = dy_te * c_t[:, None]
            given_te = tl.where((t == T - 1)[:, None], given_te + after_e[None, :], given_te)
            last_decay_te, last_given_te = flip_steps(decay_te, T, E), flip_steps(given_te, T, E)
            ones_te = tl.full([T, E], 1.0, tl.float32)
            _first_te, _factor_te, gradient_te = tl.associative_scan(
                (last_decay_te, ones_te, last_given_te), 0, compose_gradients
            )
            gradient_te = flip_steps(gradient_te, T, E)

            if z is not None:
                y_te += state_te * c_t[:, None]
            ddrive_te += gradient_te * b_t[:, None]
            # What of the state came from before the step, and so depends on its decay.
            of_decay_te = gradient_te * (state_te - own_te)
            ddelta_te += of_decay_te * A_e[None, :]
            dA_e = tl.sum(of_decay_te * delta_te, 0)
            dA_e += load_state(partial_dA, split_slot, n, channels, e, exists_e, N)
            store_state(partial_dA, dA_e, split_slot, n, channels, e, exists_e, N)
            tl.store(partial_dB + (line + n) * T + t, tl.sum(gradient_te * drive_te, 1))
            tl.store(partial_dC + (line + n) * T + t, tl.sum(state_te * dy_te, 1))
            before_e = tl.sum(tl.where((t == 0)[:, None], gradient_te * decay_te, 0.0), 0)
            if walked + 1 < count:
                store_state(carried, before_e, next_slot, n, channels, e, exists_e, N)
            elif not JOINED:
                if dinitial is not None:
                    if state_in >= 0:
                        place = dinitial + (state_in.to(tl.int64) * channels + e) * N + n
                        tl.store(place, before_e, mask=exists_e)

        # Read again rather than kept in registers through the loop over states.
        x_te = load_tile(x, row, position, channel, x_b, x_l, x_e, inside_te, STEP, T, E)
        dx_te = ddrive_te * delta_te
        ddelta_te += ddrive_te * x_te
        if SOFTPLUS:
            raw_te = load_tile(
                delta, row, position, channel, delta_b, delta_l, delta_e, inside_te, STEP, T, E
            )
            _delta_te, raw_te = step_sizes(
                raw_te, delta_bias, channel, exists_e, inside_te, SOFTPLUS, E
            )
            ddelta_te *= sigmoid(raw_te)
        if D is not None:
            D_e = tl.load(D + e, mask=exists_e, other=0.0)
            dx_te += D_e[None, :] * dy_te
            y_te += D_e[None, :] * x_te
            dD_e += tl.sum(dy_te * x_te, 0)
        dbias_e += tl.sum(tl.where(inside_te, ddelta_te, 0.0), 0)
        store_tile(
            dx, dx_te, row, position, channel, dense_b, dense_l, dense_e, inside_te, STEP, T, E
        )
        store_tile(
            ddelta, ddelta_te, row, position, channel, dense_b, dense_l, dense_e, inside_te, STEP,
            T, E,
        )  # fmt: skip
        if z is not None:
            dy_te = load_tile(dy, row, position, channel, dy_b, dy_l, dy_e, inside_te, STEP, T, E)
            z_te = load_tile(z, row, position, channel, z_b, z_l, z_e, inside_te, STEP, T, E)
            dz_te = dy_te * y_te * silu_derivative(z_te)
            store_tile(
                dz, dz_te, row, position, channel, dense_b, dense_l, dense_e, inside_te, STEP, T, E
            )
    if D is not None:
        tl.store(partial_dD + split_slot * channels + e, dD_e, mask=exists_e)
    if delta_bias is not None:
        tl.store(partial_dbias + split_slot * channels + e, dbias_e, mask=exists_e)


@triton.jit(do_not_specialize=SIZES)
def unpack_map_gradients_kernel(
    partial, gradient, chunk_table, chunks, length, chunks_per_row, groups, blocks_per_group,
    N: tl.constexpr, PADDED_N: tl.constexpr, REVERSE: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Add what the blocks of channels give of dB or dC, (blocks, chunks, g, n, T), in their order.

    The sums go where the chunks lie: `gradient` is (b, l, g, n), contiguous.
    """
    chunk, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    row, position, steps = chunk_bounds(
        chunk, chunk_table, chunks, length, chunks_per_row, REVERSE, T
    )
    STEP: tl.constexpr = -1 if REVERSE else 1
    t, n = tl.arange(0, T), tl.arange(0, PADDED_N)
    sum_tn = tl.zeros([T, PADDED_N], tl.float32)
    for block in range(blocks_per_group):
        line = ((tl.cast(block, tl.int64) * chunks + chunk) * groups + group) * N
        places = (line + n)[None, :] * T + t[:, None]
        sum_tn += tl.load(partial + places, mask=(n < N)[None, :], other=0.0)
    inside_tn = (t < steps)[:, None] & (n < N)[None, :]
    line_t = (row * length + position + t * STEP) * groups + group
    tl.store(gradient + line_t[:, None] * N + n[None, :], sum_tn, mask=inside_tn)
