"""Triton kernels of the windows that segments of a convolution start from and leave.

A program takes a segment and a block of channels; what a segment and a window are is said in
`triton_kernels`.
"""

import triton
import triton.language as tl

from anymamba.ops.conv.triton_kernels import SIZES


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


@triton.jit(do_not_specialize=SIZES)
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


@triton.jit(do_not_specialize=SIZES)
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
