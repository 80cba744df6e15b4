"""The state space duality in Triton: the kernels of the forward pass, and of one step.

The chunked algorithm of `anymamba.ops.ssd.chunked`, a kernel for each of its parts: step sizes and
their sums, C B, what each chunk adds to the state, the states at the chunks' borders, outputs. Only
the borders are walked one after the other.

Letters: c chunk, q a chunk's steps, t and s two of them (t the later), p and n as in the operator.
A stride is named by its tensor and its axis: x_b, x_l, x_h, x_p. What is multiplied by one is a
number of 64 bits, because a product of two of 32 overflows in a large tensor.
"""

import triton
import triton.language as tl

from anymamba.ops.triton import is_interpreted
from anymamba.ops.triton_functions import silu, softplus

# Whether Triton's interpreter runs the kernels, which knows bfloat16 only half.
INTERPRETED = tl.constexpr(is_interpreted())
SIZES = ["chunks_per_row", "length", "batch", "dt_b", "heads_per_program"]
"""What differs from call to call: kernels that were compiled for one length serve all."""


@triton.jit
def add_product(total, a, b, PARTS: tl.constexpr):
    """total + a b, a matrix product in float32, on the units that multiply bfloat16.

    A number of float32 is a sum of bfloat16 numbers of 8 bits each: PARTS of 2 keep 16 bits, which
    is more than 16-bit inputs have, and PARTS of 3 all 24. What is bfloat16 already has one part.
    """
    a0, b0 = _rounded(a), _rounded(b)
    total = _add_product_of_parts(total, a0, b0)
    if b.dtype != tl.bfloat16:
        b_rest = b - b0.to(tl.float32)
        b1 = _rounded(b_rest)
        total = _add_product_of_parts(total, a0, b1)
        if PARTS == 3:
            total = _add_product_of_parts(total, a0, _rounded(b_rest - b1.to(tl.float32)))
    if a.dtype != tl.bfloat16:
        a_rest = a - a0.to(tl.float32)
        a1 = _rounded(a_rest)
        total = _add_product_of_parts(total, a1, b0)
        if b.dtype != tl.bfloat16:
            total = _add_product_of_parts(total, a1, b1)
        if PARTS == 3:
            total = _add_product_of_parts(total, _rounded(a_rest - a1.to(tl.float32)), b0)
    return total


@triton.jit
def _rounded(x):
    """As bfloat16."""
    if INTERPRETED and x.dtype == tl.float32:  # it would cut off what a GPU rounds
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def _add_product_of_parts(total, a, b):
    if INTERPRETED:  # the interpreter would multiply the bits of bfloat16 as whole numbers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def load_tile(place, rows, row_stride, columns, column_stride, row_mask, column_mask):
    """A matrix of numbers, zeros where the masks say no: bfloat16 stays, the rest is float32."""
    places = place + rows[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    tile = tl.load(places, mask=row_mask[:, None] & column_mask[None, :], other=0.0)
    if tile.dtype != tl.bfloat16:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def place_of_chunk(chunks, c, chunks_per_row, length, Q: tl.constexpr):
    """The row of a chunk, its first step, and the step behind its last."""
    if chunks is None:
        row = c // chunks_per_row
        start = (c % chunks_per_row) * Q
        stop = tl.minimum(start + Q, length)
    else:
        row = tl.load(chunks + c * 3)
        start = tl.load(chunks + c * 3 + 1)
        stop = tl.load(chunks + c * 3 + 2)
    return row, start, stop


@triton.jit
def decays(steps, t, s, Q: tl.constexpr):
    """exp(a_t - a_s) for s <= t, else 0, from what `steps_kernel` wrote for a chunk's head."""
    high = tl.load(steps + Q + t)[:, None] - tl.load(steps + Q + s)[None, :]
    low = tl.load(steps + 2 * Q + t)[:, None] - tl.load(steps + 2 * Q + s)[None, :]
    return tl.exp(tl.where(t[:, None] >= s[None, :], high + low, float("-inf")))


@triton.jit
def decay_from_start(steps, t, Q: tl.constexpr):
    return tl.exp(tl.load(steps + Q + t) + tl.load(steps + 2 * Q + t))


@triton.jit
def decay_to_end(steps, s, Q: tl.constexpr):
    high = tl.load(steps + 2 * Q - 1) - tl.load(steps + Q + s)
    return tl.exp(high + (tl.load(steps + 3 * Q - 1) - tl.load(steps + 2 * Q + s)))


@triton.jit
def decay_through(steps, Q: tl.constexpr):
    return tl.exp(tl.load(steps + 2 * Q - 1) + tl.load(steps + 3 * Q - 1))


@triton.jit
def biased(dt, bias, heads, head_mask):
    """dt with its bias, in float32."""
    dt = dt.to(tl.float32)
    if bias is not None:
        dt += tl.load(bias + heads, mask=head_mask, other=0.0)
    return dt


@triton.jit
def limited(step, low, high):
    """A step size within the limits; NaN stays."""
    return tl.where(step < low, low, tl.where(step > high, high, step))


@triton.jit
def _add_exactly(high, low, other_high, other_low):
    """The sum of two numbers that are each a float32 and what it lost to rounding."""
    total = high + other_high
    gained = total - high
    lost = (high - (total - gained)) + (other_high - gained)
    return total, lost + (low + other_low)


@triton.jit(do_not_specialize=SIZES)
def steps_kernel(
    dt, dt_b, dt_l, dt_h, A, bias, chunks, steps,
    chunks_per_row, length, h, low, high,
    SOFTPLUS: tl.constexpr, Q: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """Step sizes, and their sums times A, as (c, h, 3, q): the step, the sum, what the sum lost.

    The difference of two large sums must still be good to the last bits. Compiled without fused
    multiplications and additions, which would round a product once here and once there.
    """
    c = tl.program_id(0).to(tl.int64)
    row, start, stop = place_of_chunk(chunks, c, chunks_per_row, length, Q)
    q = tl.arange(0, Q)
    heads = tl.program_id(1).to(tl.int64) * H + tl.arange(0, H)
    head_mask = heads < h
    mask = (start + q < stop)[:, None] & head_mask[None, :]
    places = dt + row * dt_b + (start + q)[:, None] * dt_l + heads[None, :] * dt_h
    step = biased(tl.load(places, mask=mask, other=0.0), bias, heads, head_mask)
    if SOFTPLUS:
        step = softplus(step)
    step = tl.where(mask, limited(step, low, high), 0.0)
    product = step * tl.load(A + heads, mask=head_mask, other=0.0)[None, :]
    sums, lost = tl.associative_scan((product, tl.zeros_like(product)), 0, _add_exactly)
    places = steps + (c * h + heads)[None, :] * (3 * Q) + q[:, None]
    mask = head_mask[None, :]
    tl.store(places, step, mask=mask)
    tl.store(places + Q, sums, mask=mask)
    tl.store(places + 2 * Q, lost, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def scores_kernel(
    B, B_b, B_l, B_g, B_n, C, C_b, C_l, C_g, C_n, chunks, scores,
    chunks_per_row, length, g, n,
    PARTS: tl.constexpr, Q: tl.constexpr, T: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """C_t B_s for the steps s <= t of a chunk, in tiles of (T, T), as (c, g, q, q)."""
    c, group = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    tiles: tl.constexpr = Q // T
    t = tl.program_id(2) // tiles * T + tl.arange(0, T)
    s = tl.program_id(2) % tiles * T + tl.arange(0, T)
    if tl.program_id(2) % tiles <= tl.program_id(2) // tiles:
        row, start, stop = place_of_chunk(chunks, c, chunks_per_row, length, Q)
        B += row * B_b + group * B_g
        C += row * C_b + group * C_g
        total = tl.zeros((T, T), tl.float32)
        for n0 in range(0, n, N):
            ns = n0 + tl.arange(0, N)
            C_tn = load_tile(C, start + t, C_l, ns, C_n, start + t < stop, ns < n)
            B_sn = load_tile(B, start + s, B_l, ns, B_n, start + s < stop, ns < n)
            total = add_product(total, C_tn, tl.trans(B_sn), PARTS)
        scores += (c * g + group) * (Q * Q)
        tl.store(scores + t[:, None] * Q + s[None, :], total)


@triton.jit(do_not_specialize=SIZES)
def additions_kernel(
    x, x_b, x_l, x_h, x_p, z, z_b, z_l, z_h, z_p, B, B_b, B_l, B_g, B_n,
    steps, chunks, additions,
    chunks_per_row, length, h, p, n, heads_per_group,
    BACKWARD: tl.constexpr, PARTS: tl.constexpr,
    Q: tl.constexpr, T: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """What each chunk adds to the state by its end, as (c, h, p, n).

    BACKWARD, what it adds to the gradient of the state that it starts from: x is then the gradient
    of y, which the gate z scales, and B is C.
    """
    c, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    n_tiles = tl.cdiv(n, N)
    ps = tl.program_id(2) // n_tiles * P + tl.arange(0, P)
    ns = tl.program_id(2) % n_tiles * N + tl.arange(0, N)
    row, start, stop = place_of_chunk(chunks, c, chunks_per_row, length, Q)
    steps += (c * h + head) * (3 * Q)
    x += row * x_b + head * x_h
    B += row * B_b + head // heads_per_group * B_g
    total = tl.zeros((P, N), tl.float32)
    for s0 in range(0, Q, T):
        s = s0 + tl.arange(0, T)
        at = start + s
        x_sp = load_tile(x, at, x_l, ps, x_p, at < stop, ps < p).to(tl.float32)
        if BACKWARD:
            weight = decay_from_start(steps, s, Q)
            if z is not None:
                z_head = z + row * z_b + head * z_h
                z_sp = load_tile(z_head, at, z_l, ps, z_p, at < stop, ps < p)
                x_sp *= silu(z_sp.to(tl.float32))
        else:
            weight = decay_to_end(steps, s, Q) * tl.load(steps + s)
        B_sn = load_tile(B, at, B_l, ns, B_n, at < stop, ns < n)
        total = add_product(total, tl.trans(x_sp * weight[:, None]), B_sn, PARTS)
    additions += (c * h + head) * p * n
    mask = (ps < p)[:, None] & (ns < n)[None, :]
    tl.store(additions + ps[:, None] * n + ns[None, :], total, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def states_kernel(
    states, initial, last, steps, segments,
    chunks_per_row, h, pn,
    BACKWARD: tl.constexpr, Q: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Replace what each chunk adds to the state by the state that it starts from, in order.

    BACKWARD, replace what it adds to the gradient of that state by the gradient of the state that
    it hands on, in reverse; initial and last are then the gradients of the last and first states.
    """
    segment, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = tl.program_id(2) * S + tl.arange(0, S)
    mask = at < pn
    if segments is None:
        first, count = segment * chunks_per_row, chunks_per_row
        state_in, state_out = segment, segment
    else:
        first = tl.load(segments + segment * 4)
        count = tl.load(segments + segment * 4 + 1)
        state_in = tl.load(segments + segment * 4 + (3 if BACKWARD else 2))
        state_out = tl.load(segments + segment * 4 + (2 if BACKWARD else 3))
    state = tl.zeros((S,), tl.float32)
    if initial is not None:
        given = at < tl.where(state_in >= 0, pn, 0)
        state = tl.load(initial + (state_in * h + head) * pn + at, given, 0.0)
    for i in range(count):
        c = first + (count - 1 - i if BACKWARD else i)
        places = states + (c * h + head) * pn + at
        addition = tl.load(places, mask, 0.0)
        tl.store(places, state, mask)
        state = state * decay_through(steps + (c * h + head) * (3 * Q), Q) + addition
    if last is not None:
        kept = at < tl.where(state_out >= 0, pn, 0)
        tl.store(last + (state_out * h + head) * pn + at, state, kept)


@triton.jit(do_not_specialize=SIZES)
def outputs_kernel(
    x, x_b, x_l, x_h, x_p, C, C_b, C_l, C_g, C_n, z, z_b, z_l, z_h, z_p,
    D, D_h, D_p, steps, scores, states, chunks, y,
    chunks_per_row, length, h, p, n, heads_per_group,
    PARTS: tl.constexpr, Q: tl.constexpr, T: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The outputs of T steps of a chunk's head, with skip connection and gate."""
    c, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    tiles: tl.constexpr = Q // T
    t0 = tl.program_id(2) % tiles * T
    t = t0 + tl.arange(0, T)
    ps = tl.program_id(2) // tiles * P + tl.arange(0, P)
    row, start, stop = place_of_chunk(chunks, c, chunks_per_row, length, Q)
    group = head // heads_per_group
    steps += (c * h + head) * (3 * Q)
    states += (c * h + head) * p * n
    x += row * x_b + head * x_h
    C += row * C_b + group * C_g
    scores += (c * (h // heads_per_group) + group) * (Q * Q)

    y_tp = tl.zeros((T, P), tl.float32)
    for n0 in range(0, n, N):
        ns = n0 + tl.arange(0, N)
        C_tn = load_tile(C, start + t, C_l, ns, C_n, start + t < stop, ns < n)
        state_pn = load_tile(states, ps, n, ns, 1, ps < p, ns < n)
        y_tp = add_product(y_tp, C_tn, tl.trans(state_pn), PARTS)
    y_tp *= decay_from_start(steps, t, Q)[:, None]
    for s0 in range(0, t0 + T, T):
        s = s0 + tl.arange(0, T)
        weights = tl.load(scores + t[:, None] * Q + s[None, :]) * tl.load(steps + s)[None, :]
        x_sp = load_tile(x, start + s, x_l, ps, x_p, start + s < stop, ps < p)
        y_tp = add_product(y_tp, weights * decays(steps, t, s, Q), x_sp, PARTS)

    at, mask = start + t, start + t < stop
    if D is not None:
        x_tp = load_tile(x, at, x_l, ps, x_p, mask, ps < p).to(tl.float32)
        y_tp += tl.load(D + head * D_h + ps * D_p, ps < p, 0.0)[None, :] * x_tp
    if z is not None:
        z_tp = load_tile(z + row * z_b + head * z_h, at, z_l, ps, z_p, mask, ps < p)
        y_tp *= silu(z_tp.to(tl.float32))
    places = y + ((row * length + at) * h + head)[:, None] * p + ps[None, :]
    tl.store(places, y_tp, mask=mask[:, None] & (ps < p)[None, :])


@triton.jit(do_not_specialize=SIZES)
def step_kernel(
    state, state_b, state_h, state_p, state_n, x, x_b, x_h, x_p, dt, dt_b, dt_h, A,
    B, B_b, B_g, B_n, C, C_b, C_g, C_n, D, D_h, D_p, z, z_b, z_h, z_p, bias, y, y_b, y_h, y_p,
    h, p, n, heads_per_group, low, high,
    SOFTPLUS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One step of P channels of a head, whose states are changed in place."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    group = head // heads_per_group
    ps = tl.program_id(2).to(tl.int64) * P + tl.arange(0, P)
    mask = ps < p
    step = biased(tl.load(dt + row * dt_b + head * dt_h), bias, head, True)
    if SOFTPLUS:
        step = softplus(step)
    step = limited(step, low, high)
    decay = tl.exp(step * tl.load(A + head))
    x_now = tl.load(x + row * x_b + head * x_h + ps * x_p, mask, 0.0).to(tl.float32)
    y_now = tl.zeros((P,), tl.float32)
    for n0 in range(0, n, N):
        ns = n0 + tl.arange(0, N).to(tl.int64)
        places = state + row * state_b + head * state_h
        places += ps[:, None] * state_p + ns[None, :] * state_n
        both = mask[:, None] & (ns < n)[None, :]
        B_now = tl.load(B + row * B_b + group * B_g + ns * B_n, ns < n, 0.0).to(tl.float32)
        C_now = tl.load(C + row * C_b + group * C_g + ns * C_n, ns < n, 0.0).to(tl.float32)
        state_pn = tl.load(places, both, 0.0).to(tl.float32) * decay
        state_pn += (step * x_now)[:, None] * B_now[None, :]
        tl.store(places, state_pn, both)
        y_now += tl.sum(state_pn * C_now[None, :], axis=1)
    if D is not None:
        y_now += tl.load(D + head * D_h + ps * D_p, mask, 0.0) * x_now
    if z is not None:
        y_now *= silu(tl.load(z + row * z_b + head * z_h + ps * z_p, mask, 0.0).to(tl.float32))
    tl.store(y + row * y_b + head * y_h + ps * y_p, y_now, mask)
