"""The state space duality in Triton: the kernels of the backward pass.

It computes the states at the borders of the chunks again, and in the same way their gradients, by
the kernels of the forward pass. What is here goes through each chunk alone. Letters and names as in
`anymamba.ops.ssd.triton_kernels`; dx stands for the gradient of x, and a chunk is one tile.

The rates' gradients: at a step u, dt A is part of the exponent of every decay from a step s < u to
a step t >= u, and gets what all of these get. They are added up as they are. Differences of sums
over later and earlier steps would lose the small ones to rounding.
"""

import triton
import triton.language as tl

from anymamba.ops.ssd.triton_kernels import (
    SIZES,
    add_product,
    biased,
    decay_from_start,
    decay_through,
    decay_to_end,
    decays,
    limited,
    load_tile,
    place_of_chunk,
)
from anymamba.ops.triton_functions import sigmoid, silu, silu_derivative, softplus


@triton.jit
def _load_before_gate(dy, dy_l, dy_p, z, z_l, z_p, at, ps, mask, p_mask):
    """The gradient of what the gate z multiplies."""
    dy_tp = load_tile(dy, at, dy_l, ps, dy_p, mask, p_mask)
    if z is not None:
        z_tp = load_tile(z, at, z_l, ps, z_p, mask, p_mask).to(tl.float32)
        dy_tp = dy_tp.to(tl.float32) * silu(z_tp)
    return dy_tp


@triton.jit(do_not_specialize=SIZES)
def heads_kernel(
    x, x_b, x_l, x_h, x_p, B, B_b, B_l, B_g, B_n, C, C_b, C_l, C_g, C_n,
    z, z_b, z_l, z_h, z_p, D, D_h, D_p, dy, dy_b, dy_l, dy_h, dy_p,
    steps, scores, states, dstates, chunks, dx, dz, dD, dsteps,
    chunks_per_row, length, h, p, n, heads_per_group,
    PARTS: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The gradients that belong to one head: of x, z and D, and those of the step sizes in parts.

    dsteps, (c, h, 2, q): the gradient of the step size where it weighs an input, and that of step
    size times A.
    """
    c, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, start, stop = place_of_chunk(chunks, c, chunks_per_row, length, Q)
    group = head // heads_per_group
    q = tl.arange(0, Q)
    at, mask = start + q, start + q < stop
    x += row * x_b + head * x_h
    dy += row * dy_b + head * dy_h
    B += row * B_b + group * B_g
    C += row * C_b + group * C_g
    if z is not None:
        z += row * z_b + head * z_h
    steps += (c * h + head) * (3 * Q)
    states += (c * h + head) * p * n
    dstates += (c * h + head) * p * n
    scores += (c * (h // heads_per_group) + group) * (Q * Q)

    step = tl.load(steps + q)
    from_start, to_end = decay_from_start(steps, q, Q), decay_to_end(steps, q, Q)
    scores_ts = tl.load(scores + q[:, None] * Q + q[None, :])
    weights = scores_ts * decays(steps, q, q, Q)

    pairs = tl.zeros((Q, Q), tl.float32)
    for p0 in range(0, p, P):
        ps = p0 + tl.arange(0, P)
        x_sp = load_tile(x, at, x_l, ps, x_p, mask, ps < p)
        dy_tp = _load_before_gate(dy, dy_l, dy_p, z, z_l, z_p, at, ps, mask, ps < p)
        pairs = add_product(pairs, dy_tp, tl.trans(x_sp), PARTS)
    pairs *= weights
    dstep = tl.sum(pairs, axis=0)
    # A sum over s < u for each t and u, then one over t >= u.
    across = tl.where(q[:, None] > q[None, :], pairs * step[None, :], 0.0)
    ones = tl.where(q[:, None] < q[None, :], 1.0, 0.0).to(tl.bfloat16)
    across = add_product(tl.zeros((Q, Q), tl.float32), across, ones, PARTS)

    from_past, to_future = tl.zeros((Q,), tl.float32), tl.zeros((Q,), tl.float32)
    through = 0.0
    for p0 in range(0, p, P):
        ps = p0 + tl.arange(0, P)
        x_sp = load_tile(x, at, x_l, ps, x_p, mask, ps < p)
        past, future = tl.zeros((Q, P), tl.float32), tl.zeros((Q, P), tl.float32)
        for n0 in range(0, n, N):
            ns = n0 + tl.arange(0, N)
            state_pn = load_tile(states, ps, n, ns, 1, ps < p, ns < n)
            dstate_pn = load_tile(dstates, ps, n, ns, 1, ps < p, ns < n)
            through += tl.sum(state_pn * dstate_pn)
            C_tn = load_tile(C, at, C_l, ns, C_n, mask, ns < n)
            past = add_product(past, C_tn, tl.trans(state_pn), PARTS)
            B_sn = load_tile(B, at, B_l, ns, B_n, mask, ns < n)
            future = add_product(future, B_sn, tl.trans(dstate_pn), PARTS)
        past *= from_start[:, None]
        to_future += tl.sum(future * x_sp, axis=1)
        dy_tp = _load_before_gate(dy, dy_l, dy_p, z, z_l, z_p, at, ps, mask, ps < p)
        from_past += tl.sum(past * dy_tp, axis=1)

        dx_sp = add_product(future * to_end[:, None], tl.trans(weights), dy_tp, PARTS)
        dx_sp *= step[:, None]
        if D is not None:
            D_now = tl.load(D + head * D_h + ps * D_p, ps < p, 0.0).to(tl.float32)
            dx_sp += D_now[None, :] * dy_tp
            dD_p = tl.sum(x_sp.to(tl.float32) * dy_tp, axis=0)
            tl.store(dD + (c * h + head) * p + ps, dD_p, ps < p)
        places = ((row * length + at) * h + head)[:, None] * p + ps[None, :]
        both = mask[:, None] & (ps < p)[None, :]
        tl.store(dx + places, dx_sp, both)
        if z is not None:
            y_tp = add_product(past, weights * step[None, :], x_sp, PARTS)
            if D is not None:
                y_tp += D_now[None, :] * x_sp
            z_tp = load_tile(z, at, z_l, ps, z_p, mask, ps < p).to(tl.float32)
            given = load_tile(dy, at, dy_l, ps, dy_p, mask, ps < p)
            tl.store(dz + places, y_tp * given * silu_derivative(z_tp), both)

    through *= decay_through(steps, Q)
    to_future *= to_end
    dstep += to_future
    # Every decay from a step s < u to a step t >= u; from before the chunk, and to behind it.
    later = tl.where(q[:, None] >= q[None, :], across + from_past[:, None], 0.0)
    before = tl.where(q[:, None] < q[None, :], (to_future * step)[:, None], 0.0)
    dproduct = through + tl.sum(later, axis=0) + tl.sum(before, axis=0)
    dsteps += (c * h + head) * (2 * Q)
    tl.store(dsteps + q, dstep)
    tl.store(dsteps + Q + q, dproduct)


@triton.jit(do_not_specialize=SIZES)
def maps_kernel(
    x, x_b, x_l, x_h, x_p, B, B_b, B_l, B_g, B_n, C, C_b, C_l, C_g, C_n,
    z, z_b, z_l, z_h, z_p, dy, dy_b, dy_l, dy_h, dy_p,
    steps, states, dstates, chunks, dB, dC,
    chunks_per_row, length, batch, h, p, n, g, heads_per_group, heads_per_program,
    PARTS: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The gradients of B and C, added up over some heads of a group: (parts, b, l, g, n)."""
    c = tl.program_id(0).to(tl.int64)
    group = (tl.program_id(1) % g).to(tl.int64)
    part = (tl.program_id(1) // g).to(tl.int64)
    row, start, stop = place_of_chunk(chunks, c, chunks_per_row, length, Q)
    q = tl.arange(0, Q)
    at, mask = start + q, start + q < stop
    ns = tl.program_id(2) * N + tl.arange(0, N)
    dB_sn, dC_tn = tl.zeros((Q, N), tl.float32), tl.zeros((Q, N), tl.float32)
    dscores = tl.zeros((Q, Q), tl.float32)
    first = tl.program_id(1) // g * heads_per_program
    for j in range(first, tl.minimum(first + heads_per_program, heads_per_group)):
        head = group * heads_per_group + j
        steps_head = steps + (c * h + head) * (3 * Q)
        weight = (decay_to_end(steps_head, q, Q) * tl.load(steps_head + q))[:, None]
        from_start = decay_from_start(steps_head, q, Q)[:, None]
        x_head = x + row * x_b + head * x_h
        dy_head = dy + row * dy_b + head * dy_h
        z_head = z
        if z is not None:
            z_head = z + row * z_b + head * z_h
        pairs = tl.zeros((Q, Q), tl.float32)
        for p0 in range(0, p, P):
            ps = p0 + tl.arange(0, P)
            x_sp = load_tile(x_head, at, x_l, ps, x_p, mask, ps < p)
            dy_tp = _load_before_gate(dy_head, dy_l, dy_p, z_head, z_l, z_p, at, ps, mask, ps < p)
            pairs = add_product(pairs, dy_tp, tl.trans(x_sp), PARTS)
            here = (c * h + head) * p * n
            state_pn = load_tile(states + here, ps, n, ns, 1, ps < p, ns < n)
            dC_tn = add_product(dC_tn, dy_tp * from_start, state_pn, PARTS)
            dstate_pn = load_tile(dstates + here, ps, n, ns, 1, ps < p, ns < n)
            dB_sn = add_product(dB_sn, x_sp * weight, dstate_pn, PARTS)
        dscores += pairs * decays(steps_head, q, q, Q) * tl.load(steps_head + q)[None, :]
    B_sn = load_tile(B + row * B_b + group * B_g, at, B_l, ns, B_n, mask, ns < n)
    C_tn = load_tile(C + row * C_b + group * C_g, at, C_l, ns, C_n, mask, ns < n)
    dB_sn = add_product(dB_sn, tl.trans(dscores), C_tn, PARTS)
    dC_tn = add_product(dC_tn, dscores, B_sn, PARTS)
    places = (((part * batch + row) * length + at) * g + group)[:, None] * n + ns[None, :]
    both = mask[:, None] & (ns < n)[None, :]
    tl.store(dB + places, dB_sn, both)
    tl.store(dC + places, dC_tn, both)


@triton.jit(do_not_specialize=SIZES)
def dt_kernel(
    dt, dt_b, dt_l, dt_h, A, bias, chunks, dsteps, ddt, dA, dbias,
    chunks_per_row, length, h, low, high,
    SOFTPLUS: tl.constexpr, Q: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """The gradients of dt, and of A and the bias by chunks, (c, h)."""
    c = tl.program_id(0).to(tl.int64)
    row, start, stop = place_of_chunk(chunks, c, chunks_per_row, length, Q)
    q = tl.arange(0, Q)
    heads = tl.program_id(1).to(tl.int64) * H + tl.arange(0, H)
    head_mask = heads < h
    at = (start + q)[:, None]
    mask = (at < stop) & head_mask[None, :]
    raw = tl.load(dt + row * dt_b + at * dt_l + heads[None, :] * dt_h, mask=mask, other=0.0)
    raw = biased(raw, bias, heads, head_mask)
    step = raw
    if SOFTPLUS:
        step = softplus(raw)
    places = dsteps + (c * h + heads)[None, :] * (2 * Q) + q[:, None]
    dproduct = tl.load(places + Q, mask=mask, other=0.0)
    A_h = tl.load(A + heads, mask=head_mask, other=0.0).to(tl.float32)
    dstep = tl.load(places, mask=mask, other=0.0) + dproduct * A_h[None, :]
    dstep = tl.where((step >= low) & (step <= high), dstep, 0.0)
    if SOFTPLUS:
        dstep *= sigmoid(raw)
    tl.store(ddt + (row * length + at) * h + heads[None, :], dstep, mask=mask)
    dA_qh = tl.where(mask, dproduct * limited(step, low, high), 0.0)
    tl.store(dA + c * h + heads, tl.sum(dA_qh, axis=0), mask=head_mask)
    if bias is not None:
        tl.store(dbias + c * h + heads, tl.sum(dstep, axis=0), mask=head_mask)
