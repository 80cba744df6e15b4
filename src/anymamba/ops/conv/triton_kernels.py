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

SIZES = ["length", "n_segments", "tiles"]
"""What differs from call to call: kernels that were compiled for one length serve all."""


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
    if window is not None and lag > 0:
        places = (state * window_state + column * window_column)[:, None]
        mask = (is_step & ~is_in_x & (state >= 0))[:, None] & is_channel[None, :]
        values += tl.load(window[None, :] + places, mask=mask, other=0.0).to(tl.float32)
    return values


@triton.jit
def _convolved(
    x,
    window,
    weight,
    bias,
    step,
    start,
    stop,
    state,
    channel,
    is_step,
    is_channel,
    columns,
    x_step,
    window_state,
    window_column,
    weight_channel,
    weight_tap,
    bias_channel,
    REVERSE: tl.constexpr,
    K: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The sum over all taps and the bias, before SiLU, for a tile."""
    # All taps of a channel lie next to each other, so they are read at once and taken one by one.
    tap = tl.arange(0, TAPS)
    places = (channel * weight_channel)[:, None] + (tap * weight_tap)[None, :]
    mask = is_channel[:, None] & (tap < K)[None, :]
    weights = tl.load(weight + places, mask=mask, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for lag in tl.static_range(K):
        values = _inputs_before(
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
            lag,
            REVERSE,
        )
        total += tl.sum(tl.where((tap == K - 1 - lag)[None, :], weights, 0.0), 1)[None, :] * values
    if bias is not None:
        places = bias + channel * bias_channel
        total += tl.load(places, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit(do_not_specialize=SIZES)
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
    TAPS: tl.constexpr,
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
    total = _convolved(
        x + row * x_row + channel * x_channel,
        window,
        weight,
        bias,
        step,
        start,
        stop,
        state,
        channel,
        is_step,
        is_channel,
        columns,
        x_step,
        initial_state,
        initial_column,
        weight_channel,
        weight_tap,
        bias_channel,
        REVERSE,
        K,
        TAPS,
        BLOCK_T,
        BLOCK_E,
    )
    if SILU:
        total = silu(total)
    places = y + row * y_row + (step * y_step)[:, None] + (channel * y_channel)[None, :]
    tl.store(places, total, mask=is_step[:, None] & is_channel[None, :])


@triton.jit(do_not_specialize=SIZES)
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
    TAPS: tl.constexpr,
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
        total = _convolved(
            x + row * x_row + channel * x_channel,
            window,
            weight,
            bias,
            step,
            start,
            stop,
            state,
            channel,
            is_step,
            is_channel,
            columns,
            x_step,
            initial_state,
            initial_column,
            weight_channel,
            weight_tap,
            bias_channel,
            REVERSE,
            K,
            TAPS,
            BLOCK_T,
            BLOCK_E,
        )
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
