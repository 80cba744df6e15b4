"""Triton kernels of RMSNorm: a program takes whole rows, several where they are short.

Rows are numbered over two axes, each with its stride, so that groups of channels in a part of a
projection are rows without a copy. Results lie without gaps.
"""

import triton
import triton.language as tl

from anymamba.ops.triton_functions import silu, silu_derivative

SIZES = ["rows", "inner", "repeats"]
"""What differs from call to call: kernels that were compiled for one length serve all."""


@triton.jit
def _load(pointer, row, inner, column, stride_outer, stride_inner, stride_column, inside):
    """Rows of a tensor (outer, inner, d) in float32, zeros where there are none."""
    start = (row // inner) * stride_outer + (row % inner) * stride_inner
    places = start[:, None] + column[None, :].to(tl.int64) * stride_column
    return tl.load(pointer + places, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=SIZES)
def norm_forward(
    x,
    residual,
    gate,
    weight,
    normed,
    total,
    scale,
    rows,
    inner,
    d,
    eps,
    x_outer,
    x_inner,
    x_column,
    residual_outer,
    residual_inner,
    residual_column,
    gate_outer,
    gate_inner,
    gate_column,
    weight_column,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (column < d)[None, :]
    places = row[:, None] * d + column[None, :]
    value = _load(x, row, inner, column, x_outer, x_inner, x_column, inside)
    if residual is not None:
        value += _load(
            residual, row, inner, column, residual_outer, residual_inner, residual_column, inside
        )
    if gate is not None:
        value *= silu(_load(gate, row, inner, column, gate_outer, gate_inner, gate_column, inside))
    if total is not None:
        tl.store(total + places, value, mask=inside)
    inverse = tl.rsqrt(tl.sum(value * value, 1) / d + eps)
    gain = tl.load(weight + column * weight_column, mask=column < d, other=0.0).to(tl.float32)
    tl.store(normed + places, value * inverse[:, None] * gain[None, :], mask=inside)
    tl.store(scale + row, inverse, mask=row < rows)


@triton.jit(do_not_specialize=SIZES)
def norm_backward(
    x,
    gate,
    weight,
    scale,
    dnormed,
    dtotal,
    dx,
    dgate,
    dweight,
    rows,
    inner,
    d,
    repeats,
    x_outer,
    x_inner,
    x_column,
    gate_outer,
    gate_inner,
    gate_column,
    dnormed_outer,
    dnormed_inner,
    dnormed_column,
    dtotal_outer,
    dtotal_inner,
    dtotal_column,
    weight_column,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program's share of the weight's gradient goes into its row of `dweight`, (programs, d).

    With y = s t w and s = 1 / rms(t): dt = s (w dy - t s^2 mean(t w dy)), and the sum's own
    gradient is added.
    """
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    is_column = column < d
    gain = tl.load(weight + column * weight_column, mask=is_column, other=0.0).to(tl.float32)
    of_weight = tl.zeros([BLOCK_D], tl.float32)
    for repeat in range(repeats):
        row = (program * repeats + repeat) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        inside = (row < rows)[:, None] & is_column[None, :]
        places = row[:, None] * d + column[None, :]
        value = _load(x, row, inner, column, x_outer, x_inner, x_column, inside)
        t = value
        if gate is not None:
            gate_value = _load(
                gate, row, inner, column, gate_outer, gate_inner, gate_column, inside
            )
            t = value * silu(gate_value)
        inverse = tl.load(scale + row, mask=row < rows, other=0.0)
        dy = _load(
            dnormed, row, inner, column, dnormed_outer, dnormed_inner, dnormed_column, inside
        )
        unit = t * inverse[:, None]
        of_weight += tl.sum(dy * unit, 0)
        dy *= gain[None, :]
        mean = tl.sum(dy * unit, 1) / d
        dt = inverse[:, None] * (dy - unit * mean[:, None])
        if dtotal is not None:
            dt += _load(
                dtotal, row, inner, column, dtotal_outer, dtotal_inner, dtotal_column, inside
            )
        if gate is not None:
            tl.store(dgate + places, dt * value * silu_derivative(gate_value), mask=inside)
            dt *= silu(gate_value)
        tl.store(dx + places, dt, mask=inside)
    tl.store(dweight + program * d + column, of_weight, mask=is_column)
