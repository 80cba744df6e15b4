"""Triton kernels of the causal convolution: a program takes a tile of steps and channels.

A segment is a sequence in a packed row; without packing each row is one, whose states have the
row's number. `segments` is the table of `anymamba.ops.native.segment_table`, and `owner` holds the
segment of each position. The input `lag` steps before a step is in x, or in the window that the
segment starts from, (state, channel, column), whose last column is the step before the first. In
reverse, "before" is behind.

A tile is [steps, channels], with the channels next to each other in memory as the model has them.
It is read once for each tap, from the cache all but the first time.
"""

import triton
import triton.language as tl

from anymamba.ops.triton_functions import silu, silu_derivative


@triton.jit
def _owners(row, step, is_step, owner, segments, n_segments, length):
    """Start, stop and first state (-1 for none) of the segments that steps of a row belong to."""
    if segments is None:
        start = tl.zeros_like(step)
        stop = start + length
        state = start + row
    else:
        own = tl.load(owner + row * length + step, mask=is_step, other=0)
        start = tl.load(segments + n_segments + own, mask=is_step, other=0)
        stop = tl.load(segments + 2 * n_segments + own, mask=is_step, other=0)
        state = tl.load(segments + 3 * n_segments + own, mask=is_step, other=-1)
    return start, stop, state


@triton.jit
def _inputs_before(
    x,
    window,
    step,
    start,
    stop,
    state,
    is_step,
    is_channel,
    columns,
    x_step,
    window_state,
    window_column,
    lag: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """What each step of a tile meets `lag` steps before it, in float32.

    `x` and `window` point to the row's and to state 0's channels, at step and column 0.
    """
    if REVERSE:
        place = step + lag
        is_in_x = place < stop
        column = columns - 1 - (place - stop)
    else:
        place = step - lag
        is_in_x = place >= start
        column = columns - (start - place)
    mask = (is_step & is_in_x)[:, None] & is_channel[None, :]
    values = tl.load(x[None, :] + (place * x_step)[:, None], mask=mask, other=0.0).to(tl.float32)
    if window is not None:
        if lag > 0:
            places = (state * window_state + column * window_column)[:, None]
            mask = (is_step & ~is_in_x & (state >= 0))[:, None] & is_channel[None, :]
            values += tl.load(window[None, :] + places, mask=mask, other=0.0).to(tl.float32)
    return values


@triton.jit
def convolve(
    x,
    weight,
    bias,
    initial,
    owner,
    segments,
    y,
    length,
    channels,
    columns,
    n_segments,
    tiles,
    x_row,
    x_step,
    x_channel,
    weight_channel,
    weight_tap,
    bias_channel,
    initial_state,
    initial_channel,
    initial_column,
    y_row,
    y_step,
    y_channel,
    SILU: tl.constexpr,
    REVERSE: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    step = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    channel = tl.program_id(1).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    is_step, is_channel = step < length, channel < channels
    start, stop, state = _owners(row, step, is_step, owner, segments, n_segments, length)
    window = initial
    if initial is not None:
        window = initial + channel * initial_channel
    total = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for lag in tl.static_range(K):
        values = _inputs_before(
            x + row * x_row + channel * x_channel,
            window,
            step,
            start,
            stop,
            state,
            is_step,
            is_channel,
            columns,
            x_step,
            initial_state,
            initial_column,
            lag,
            REVERSE,
        )
        places = weight + channel * weight_channel + (K - 1 - lag) * weight_tap
        total += tl.load(places, mask=is_channel, other=0.0).to(tl.float32)[None, :] * values
    if bias is not None:
        places = bias + channel * bias_channel
        total += tl.load(places, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    if SILU:
        total = silu(total)
    places = y + row * y_row + (step * y_step)[:, None] + (channel * y_channel)[None, :]
    tl.store(places, total, mask=is_step[:, None] & is_channel[None, :])


@triton.jit
def convolve_backward(
    x,
    weight,
    bias,
    initial,
    owner,
    segments,
    dy,
    dtotal,
    sums,
    length,
    channels,
    columns,
    n_segments,
    tiles,
    x_row,
    x_step,
    x_channel,
    weight_channel,
    weight_tap,
    bias_channel,
    initial_state,
    initial_channel,
    initial_column,
    dy_row,
    dy_step,
    dy_channel,
    SILU: tl.constexpr,
    REVERSE: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The gradient of what SiLU is applied to, and the tile's share of the weight's and the bias's.

    `dtotal` is (row, step, channel) without gaps, `sums` (tile, K + 1, channel): a share for each
    tap, then the bias's.
    """
    row = (tl.program_id(0) // tiles).to(tl.int64)
    step = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    channel = tl.program_id(1).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    is_step, is_channel = step < length, channel < channels
    inside = is_step[:, None] & is_channel[None, :]
    start, stop, state = _owners(row, step, is_step, owner, segments, n_segments, length)
    window = initial
    if initial is not None:
        window = initial + channel * initial_channel
    places = dy + row * dy_row + (step * dy_step)[:, None] + (channel * dy_channel)[None, :]
    gradient = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        total = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
        for lag in tl.static_range(K):
            values = _inputs_before(
                x + row * x_row + channel * x_channel,
                window,
                step,
                start,
                stop,
                state,
                is_step,
                is_channel,
                columns,
                x_step,
                initial_state,
                initial_column,
                lag,
                REVERSE,
            )
            places = weight + channel * weight_channel + (K - 1 - lag) * weight_tap
            total += tl.load(places, mask=is_channel, other=0.0).to(tl.float32)[None, :] * values
        if bias is not None:
            places = bias + channel * bias_channel
            total += tl.load(places, mask=is_channel, other=0.0).to(tl.float32)[None, :]
        gradient *= silu_derivative(total)
        places = dtotal + ((row * length + step) * channels)[:, None] + channel[None, :]
        tl.store(places, gradient, mask=inside)
    share = sums + tl.program_id(0).to(tl.int64) * (K + 1) * channels + channel
    for lag in tl.static_range(K):
        values = _inputs_before(
            x + row * x_row + channel * x_channel,
            window,
            step,
            start,
            stop,
            state,
            is_step,
            is_channel,
            columns,
            x_step,
            initial_state,
            initial_column,
            lag,
            REVERSE,
        )
        tl.store(share + (K - 1 - lag) * channels, tl.sum(gradient * values, 0), mask=is_channel)
    tl.store(share + K * channels, tl.sum(gradient, 0), mask=is_channel)


@triton.jit
def _segment(number, segments, n_segments, length):
    """Row, start, stop, first and last state of a segment."""
    if segments is None:
        row = number
        start = number * 0
        stop = start + length
        state_in = number
        state_out = number
    else:
        row = tl.load(segments + number)
        start = tl.load(segments + n_segments + number)
        stop = tl.load(segments + 2 * n_segments + number)
        state_in = tl.load(segments + 3 * n_segments + number)
        state_out = tl.load(segments + 4 * n_segments + number)
    return row, start, stop, state_in, state_out


@triton.jit
def final_windows(
    x,
    initial,
    segments,
    final,
    length,
    channels,
    columns,
    n_segments,
    x_row,
    x_step,
    x_channel,
    initial_state,
    initial_channel,
    initial_column,
    REVERSE: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The last inputs of each segment, older ones from its first window; a program a segment."""
    channel = tl.program_id(1).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    # For each channel, because a mask of one number for all is beyond Triton's interpreter.
    number = tl.zeros_like(channel) + tl.program_id(0)
    row, start, stop, state_in, state_out = _segment(number, segments, n_segments, length)
    is_kept = (channel < channels) & (state_out >= 0)
    for column in range(columns):
        # How many steps of the segment come before the one that this column is of.
        index = stop - start - columns + column
        place = start + index
        if REVERSE:
            place = stop - 1 - index
        mask = is_kept & (index >= 0)
        value = tl.load(x + row * x_row + place * x_step + channel * x_channel, mask=mask, other=0)
        if initial is not None:
            places = state_in * initial_state + (columns + index) * initial_column
            mask = is_kept & (index < 0) & (state_in >= 0)
            value += tl.load(initial + places + channel * initial_channel, mask=mask, other=0)
        tl.store(final + (state_out * channels + channel) * columns + column, value, mask=is_kept)


@triton.jit
def windows_backward(
    weight,
    segments,
    dtotal,
    dfinal,
    dinitial,
    dx,
    length,
    channels,
    columns,
    n_segments,
    weight_channel,
    weight_tap,
    dtotal_row,
    dtotal_step,
    dtotal_channel,
    dfinal_state,
    dfinal_channel,
    dfinal_column,
    REVERSE: tl.constexpr,
    K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The first windows' gradients, and what the last windows' add to the inputs' in `dx`."""
    channel = tl.program_id(1).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    # For each channel, because a mask of one number for all is beyond Triton's interpreter.
    number = tl.zeros_like(channel) + tl.program_id(0)
    row, start, stop, state_in, state_out = _segment(number, segments, n_segments, length)
    is_channel = channel < channels
    steps = stop - start
    if dinitial is not None:
        for column in range(columns):
            total = tl.zeros([BLOCK_E], tl.float32)
            for lag in tl.static_range(1, K):
                # The step that meets this column `lag` steps before it.
                index = tl.zeros_like(channel) + column - columns + lag
                place = start + index
                if REVERSE:
                    place = stop - 1 - index
                mask = is_channel & (index >= 0) & (index < steps)
                places = row * dtotal_row + place * dtotal_step + channel * dtotal_channel
                gradient = tl.load(dtotal + places, mask=mask, other=0.0).to(tl.float32)
                places = weight + channel * weight_channel + (K - 1 - lag) * weight_tap
                total += tl.load(places, mask=mask, other=0.0).to(tl.float32) * gradient
            if dfinal is not None:
                # A window longer than the segment is in part what it was.
                places = state_out * dfinal_state + (column - steps) * dfinal_column
                mask = is_channel & (column >= steps) & (state_out >= 0)
                places += channel * dfinal_channel
                total += tl.load(dfinal + places, mask=mask, other=0.0).to(tl.float32)
            places = dinitial + (state_in * channels + channel) * columns + column
            tl.store(places, total, mask=is_channel & (state_in >= 0))
    if dfinal is not None:
        for column in range(columns):
            index = steps - columns + column
            place = start + index
            if REVERSE:
                place = stop - 1 - index
            mask = is_channel & (index >= 0) & (state_out >= 0)
            places = state_out * dfinal_state + column * dfinal_column + channel * dfinal_channel
            gradient = tl.load(dfinal + places, mask=mask, other=0.0).to(tl.float32)
            places = dx + (row * length + place) * channels + channel
            total = tl.load(places, mask=mask, other=0.0).to(tl.float32) + gradient
            tl.store(places, total, mask=mask)


@triton.jit
def convolve_step(
    x,
    window,
    weight,
    bias,
    y,
    channels,
    x_row,
    x_channel,
    window_row,
    window_channel,
    window_column,
    weight_channel,
    weight_tap,
    bias_channel,
    y_row,
    y_channel,
    SILU: tl.constexpr,
    K: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One step: the window of each row moves on by a column and takes in x."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    tap = tl.arange(0, TAPS)
    is_channel = channel < channels
    is_present = (tap == K - 1)[None, :]
    present = tl.load(x + row * x_row + channel * x_channel, mask=is_channel, other=0.0)
    places = window + row * window_row + (channel * window_channel)[:, None]
    places += (tap * window_column)[None, :]
    mask = is_channel[:, None] & (tap < K - 1)[None, :]
    kept = tl.load(places + window_column, mask=mask, other=0.0)
    # What a window wider than x holds counts as x does.
    values = tl.where(is_present, present[:, None], kept.to(present.dtype)).to(tl.float32)
    inside = is_channel[:, None] & (tap < K)[None, :]
    weights = (channel * weight_channel)[:, None] + (tap * weight_tap)[None, :]
    total = tl.sum(values * tl.load(weight + weights, mask=inside, other=0.0).to(tl.float32), 1)
    if bias is not None:
        total += tl.load(bias + channel * bias_channel, mask=is_channel, other=0.0).to(tl.float32)
    if SILU:
        total = silu(total)
    tl.store(y + row * y_row + channel * y_channel, total, mask=is_channel)
    # No thread overwrites what another one has yet to read.
    tl.debug_barrier()
    tl.store(places, tl.where(is_present, present.to(kept.dtype)[:, None], kept), mask=inside)
