"""The state space duality in chunks of some steps, so that matrix products do the work.

Within a chunk of q steps that starts from the state S, with a_t the sum of dt A up to step t,

    y_t = sum over s <= t of (C_t B_s) exp(a_t - a_s) dt_s x_s  +  exp(a_t) C_t S
    S'  = exp(a_q) S  +  sum over s of exp(a_q - a_s) B_s dt_s x_s

Source: "Transformers are SSMs" (arXiv 2405.21060), section 6. Each sum over steps or states is a
matrix product; heads of a group share B and C, so that products with states take all of them at
once. States lie as (n, heads times p) for that. Exponents are never positive for negative A, and
no decay is divided by. They are summed in float64: the difference of two large sums must still be
good to the last bits. Backward walks the chunks in reverse and recomputes what is inside each.

Letters beyond `anymamba.ops.ssd`'s: r rows of the batch, g groups, j heads of a group, q steps of
a chunk, k = r times g.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from anymamba.ops.segments import Segments, segments_from_table

__all__ = ["CHUNK_STEPS", "Gradients", "run_backward", "run_forward"]

# Measured at 24 heads of 64 with 128 states: with 32 steps passing states takes long, with 128
# the decays within a chunk do.
CHUNK_STEPS = 64
# Rows are taken together as long as a chunk of them, in numbers, stays in the second-level cache.
_CHUNK_NUMBERS = 1 << 17
# exp(-40) is 4e-18: beside the 1 with which a step meets itself, less than float64's rounding.
_SMALLEST, _TINY = -40.0, 4.3e-18


@dataclass(frozen=True)
class _Stretch:
    """Rows and steps over which states run on, and which states go in and come out."""

    rows: slice
    start: int
    stop: int
    state_in: slice | None
    state_out: slice | None

    def chunks(self, steps: int) -> list[tuple[slice, slice]]:
        """Index pairs (rows, steps) in order."""
        borders = range(self.start, self.stop, steps)
        return [(self.rows, slice(at, min(at + steps, self.stop))) for at in borders]


def _stretches(x_blhp: Tensor, table: Tensor | None, n_states: int, steps: int) -> list[_Stretch]:
    segments = segments_from_table(table, n_states)
    if segments is not None:
        return list(_one_by_one(segments))
    b, l, h, p = x_blhp.shape
    return list(_rows_together(b, l, max(1, _CHUNK_NUMBERS // max(1, steps * h * p))))


def _rows_together(b: int, l: int, rows: int) -> Iterator[_Stretch]:
    for at in range(0, b, rows):
        some = slice(at, min(at + rows, b))
        yield _Stretch(some, 0, l, some, some)


def _one_by_one(segments: Segments) -> Iterator[_Stretch]:
    def only(index: int) -> slice | None:
        return slice(index, index + 1) if index >= 0 else None

    for row, start, stop, state_in, state_out in segments:
        yield _Stretch(slice(row, row + 1), start, stop, only(state_in), only(state_out))


class _Chunk:
    """A chunk's inputs in groups, and the decays between its steps and its two ends."""

    def __init__(
        self,
        at: tuple[slice, slice],
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        above: Tensor,
    ) -> None:
        steps = at[1].stop - at[1].start
        self._above = above[:steps, :steps]
        self.g = B.shape[2]
        wide = dt.dtype
        self.x_rgqjp = self.in_groups(x[at].to(wide))
        self.dt_rgqj = self.in_groups(dt[at])
        self.B_kqn = B[at].to(wide).transpose(1, 2).flatten(0, 1)
        self.C_kqn = C[at].to(wide).transpose(1, 2).flatten(0, 1)
        # Heads before steps: the results of PyTorch's functions lie in memory as their inputs do.
        self.dt_rgjq = self.dt_rgqj.transpose(2, 3).contiguous()
        A_gj1 = A.double().view(self.g, -1, 1)
        self._sums_rgjq = torch.cumsum(self.dt_rgjq.double() * A_gj1, dim=3)
        sums_rgqj = self._sums_rgjq.transpose(2, 3)
        end_rg1j = sums_rgqj[:, :, -1:]
        self.from_start_rgqj = _decay(sums_rgqj, wide)
        self.to_end_rgqj = _decay(end_rg1j - sums_rgqj, wide)
        self.through_rg1j = _decay(end_rg1j, wide)
        self.weights_rgqj = self.to_end_rgqj * self.dt_rgqj

    def in_groups(self, tensor: Tensor) -> Tensor:
        """A view of (r, q, h, ...) as (r, g, q, j, ...)."""
        grouped: Tensor = tensor.unflatten(2, (self.g, -1))
        return grouped.transpose(1, 2)

    def decays_rgjqq(self) -> Tensor:
        """exp(a_t - a_s) for s <= t, else 0."""
        between = self._sums_rgjq[..., None] - self._sums_rgjq[..., None, :]
        between += self._above
        return _decay(between, self.dt_rgqj.dtype)

    def scores_k1qq(self) -> Tensor:
        """C_t B_s, for all heads of a group."""
        return torch.bmm(self.C_kqn, self.B_kqn.mT)[:, None]

    def outputs_rgqjp(self, state_knm: Tensor) -> Tensor:
        """y without the skip connection."""
        weights = self.decays_rgjqq()
        weights.flatten(0, 1).mul_(self.scores_k1qq())
        weights *= self.dt_rgjq[..., None, :]
        within_rgjqp = _bmm(weights, self.x_rgqjp.transpose(2, 3))
        past_rgqjp = torch.bmm(self.C_kqn, state_knm).view(self.x_rgqjp.shape)
        return within_rgjqp.transpose(2, 3).addcmul(past_rgqjp, self.from_start_rgqj[..., None])

    def pass_on(self, state_knm: Tensor) -> Tensor:
        """The state after the chunk."""
        state = self.faded(state_knm)
        drive_kqm = _flat(self.x_rgqjp * self.weights_rgqj[..., None])
        return state.baddbmm_(self.B_kqn.mT, drive_kqm)

    def faded(self, state_knm: Tensor) -> Tensor:
        """A state times the decay over the whole chunk."""
        r, g, _, j = self.through_rg1j.shape
        state = state_knm.view(r, g, -1, j, self.x_rgqjp.shape[-1])
        return (state * self.through_rg1j[..., None]).view(state_knm.shape)


def run_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    segments: Tensor | None,
    n_states: int,
    most_steps: int,
    y: Tensor,
    last: Tensor,
) -> None:
    """Fill y and the final states; arguments as `anymamba::ssd` takes them."""
    last.zero_()
    steps = min(most_steps, max(1, x.shape[1]))
    above = _minus_infinity_above(steps, x.device)
    with torch.autocast(x.device.type, enabled=False):  # the types are chosen by the caller
        for stretch in _stretches(x, segments, n_states, steps):
            state_knm = _state_into(stretch, initial, x, dt, B)
            for at in stretch.chunks(steps):
                chunk = _Chunk(at, x, dt, A, B, C, above)
                y_rgqjp = chunk.outputs_rgqjp(state_knm)
                if D is not None:
                    y_rgqjp.addcmul_(chunk.x_rgqjp, D.unflatten(0, (chunk.g, 1, -1)))
                chunk.in_groups(y[at]).copy_(y_rgqjp)
                state_knm = chunk.pass_on(state_knm)
            if stretch.state_out is not None:
                last[stretch.state_out] = _as_public(state_knm, last, B.shape[2])


def run_backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    segments: Tensor | None,
    dy: Tensor,
    dlast: Tensor | None,
    n_states: int,
    most_steps: int,
) -> list[Tensor]:
    """The gradients; arguments as `anymamba::ssd_backward` takes them."""
    found = Gradients(x, dt, A, B, C, D, initial)
    steps = min(most_steps, max(1, x.shape[1]))
    above = _minus_infinity_above(steps, x.device)
    with torch.autocast(x.device.type, enabled=False):
        for stretch in _stretches(x, segments, n_states, steps):
            state_knm = _state_into(stretch, initial, x, dt, B)
            states = []
            for at in stretch.chunks(steps):
                states.append(state_knm)
                state_knm = _Chunk(at, x, dt, A, B, C, above).pass_on(state_knm)
            dstate_knm = _state_like(dlast, stretch.state_out, state_knm, B.shape[2])
            for at, state_knm in zip(
                reversed(stretch.chunks(steps)), reversed(states), strict=True
            ):
                chunk = _Chunk(at, x, dt, A, B, C, above)
                dstate_knm = found.of_chunk(at, chunk, dy[at].to(dt.dtype), state_knm, dstate_knm)
            if initial is not None and stretch.state_in is not None:
                found.dinitial[stretch.state_in] = _as_public(dstate_knm, initial, B.shape[2])
    return found.in_order()


class Gradients:
    """The gradients of all inputs, filled chunk by chunk."""

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        initial: Tensor | None,
    ) -> None:
        self._A, self._D = A, D
        self.dx, self.ddt = torch.empty_like(x), torch.empty_like(dt)
        self.dA = torch.zeros_like(A, dtype=torch.float64)
        self.dB, self.dC = torch.empty_like(B), torch.empty_like(C)
        self.dD = x.new_empty(0) if D is None else torch.zeros_like(D)
        self.dinitial = x.new_empty(0) if initial is None else torch.zeros_like(initial)

    def in_order(self) -> list[Tensor]:
        """As the operator takes its arguments."""
        dA = self.dA.to(self._A.dtype, copy=True)
        return [self.dx, self.ddt, dA, self.dB, self.dC, self.dD, self.dinitial]

    def of_chunk(
        self,
        at: tuple[slice, slice],
        chunk: _Chunk,
        dy_rqhp: Tensor,
        state_knm: Tensor,
        dstate_knm: Tensor,
    ) -> Tensor:
        """Fill in one chunk's; returns the gradient of the state that it started from.

        `dsums` gathers the gradient of a_t: a decay exp(a_t - a_s) gives to t and takes from s.
        """
        dy_rgqjp = chunk.in_groups(dy_rqhp)
        dx_rgqjp, dB_kqn, dC_kqn, ddt_rgqj, dsums_rgqj = _within(chunk, dy_rgqjp)

        # Into the state that the chunk hands on: exp(a_q - a_s) dt_s B_s x_s and exp(a_q) S.
        to_x_rgqjp = torch.bmm(chunk.B_kqn, dstate_knm).view(dx_rgqjp.shape)
        dx_rgqjp.addcmul_(to_x_rgqjp, chunk.weights_rgqj[..., None])
        drive_kqm = _flat(chunk.x_rgqjp * chunk.weights_rgqj[..., None])
        dB_kqn.baddbmm_(drive_kqm, dstate_knm.mT)
        to_weights_rgqj = (chunk.x_rgqjp * to_x_rgqjp).sum(-1)
        ddt_rgqj += to_weights_rgqj * chunk.to_end_rgqj
        to_decays_rgqj = (to_weights_rgqj * chunk.weights_rgqj).double()
        dsums_rgqj -= to_decays_rgqj
        faded_knm = chunk.faded(dstate_knm)
        r, g, _, j = dsums_rgqj.shape
        kept_rgj = (faded_knm * state_knm).view(r, g, -1, j, dx_rgqjp.shape[-1]).sum((2, 4))
        dsums_rgqj[:, :, -1] += to_decays_rgqj.sum(2) + kept_rgj

        # Out of the state that it started from: exp(a_t) C_t S.
        from_y_kqm = _flat(dy_rgqjp * chunk.from_start_rgqj[..., None])
        past_kqm = torch.bmm(chunk.C_kqn, state_knm)
        dsums_rgqj += (from_y_kqm * past_kqm).view(dx_rgqjp.shape).sum(-1)
        dC_kqn.baddbmm_(from_y_kqm, state_knm.mT)

        self._write(at, chunk, dy_rgqjp, dx_rgqjp, dB_kqn, dC_kqn)
        self._through_sums(at, chunk, ddt_rgqj, dsums_rgqj)
        return faded_knm.baddbmm_(chunk.C_kqn.mT, from_y_kqm)

    def _write(
        self,
        at: tuple[slice, slice],
        chunk: _Chunk,
        dy_rgqjp: Tensor,
        dx_rgqjp: Tensor,
        dB_kqn: Tensor,
        dC_kqn: Tensor,
    ) -> None:
        if self._D is not None:
            dx_rgqjp.addcmul_(dy_rgqjp, self._D.unflatten(0, (chunk.g, 1, -1)))
            to_D_hp = (dy_rgqjp * chunk.x_rgqjp).sum((0, 2)).flatten(0, 1)
            self.dD += to_D_hp.sum_to_size(self.dD.shape)
        chunk.in_groups(self.dx[at]).copy_(dx_rgqjp)
        for whole, part_kqn in ((self.dB, dB_kqn), (self.dC, dC_kqn)):
            whole[at].copy_(part_kqn.unflatten(0, (-1, chunk.g)).transpose(1, 2))

    def _through_sums(
        self, at: tuple[slice, slice], chunk: _Chunk, ddt_rgqj: Tensor, dsums_rgqj: Tensor
    ) -> None:
        """A step's dt A is part of its own sum and of all later ones."""
        dproduct_rgqj = dsums_rgqj.flip(2).cumsum(2).flip(2)
        A_g1j = self._A.double().view(chunk.g, 1, -1)
        chunk.in_groups(self.ddt[at]).copy_(ddt_rgqj + dproduct_rgqj * A_g1j)
        self.dA += (dproduct_rgqj * chunk.dt_rgqj).sum((0, 2)).flatten()


def _within(chunk: _Chunk, dy_rgqjp: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, B, C, dt and the sums through (C_t B_s) exp(a_t - a_s) dt_s x_s."""
    dt_rgjq, dy_rgjqp = chunk.dt_rgjq, dy_rgqjp.transpose(2, 3)
    decays_rgjqq = chunk.decays_rgjqq()
    weights_rgjqq = (decays_rgjqq.flatten(0, 1) * chunk.scores_k1qq()).view(decays_rgjqq.shape)
    dx_rgjqp = _bmm(weights_rgjqq.mT, dy_rgjqp).mul_(dt_rgjq[..., None])

    products_rgjqq = _bmm(dy_rgjqp, chunk.x_rgqjp.transpose(2, 3).mT)
    weights_rgjqq *= products_rgjqq
    ddt_rgjq = weights_rgjqq.sum(-2)
    weights_rgjqq *= dt_rgjq[..., None, :]
    # What a pair of steps gives to one of the sums and takes from the other must cancel exactly in
    # the sums of earlier steps, or it would drown what these get from others.
    exactly = weights_rgjqq.double()
    dsums_rgjq = exactly.sum(-1) - exactly.sum(-2)

    products_rgjqq *= decays_rgjqq
    products_rgjqq *= dt_rgjq[..., None, :]
    dscores_kqq = products_rgjqq.sum(2).flatten(0, 1)
    dB_kqn = torch.bmm(dscores_kqq.mT, chunk.C_kqn)
    dC_kqn = torch.bmm(dscores_kqq, chunk.B_kqn)
    return (
        dx_rgjqp.transpose(2, 3),
        dB_kqn,
        dC_kqn,
        ddt_rgjq.transpose(2, 3),
        dsums_rgjq.transpose(2, 3),
    )


def _decay(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(exponent), and 0 where that is nothing beside 1.

    Products of such numbers reach the denormal ones, for which processors take many times longer.
    """
    found = exponent.to(dtype).clamp(min=_SMALLEST).exp_()
    return F.threshold(found, _TINY, 0.0, inplace=True)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """A product for each of the (r, g, j); only copies where they do not lie evenly."""
    return torch.bmm(a.flatten(0, 2), b.flatten(0, 2)).view(*a.shape[:-1], b.shape[-1])


def _flat(tensor_rgqjp: Tensor) -> Tensor:
    """As (k, q, m) with m = j times p."""
    return tensor_rgqjp.flatten(3, 4).flatten(0, 1)


def _state_into(
    stretch: _Stretch, initial: Tensor | None, x: Tensor, dt: Tensor, B: Tensor
) -> Tensor:
    (h, p), (g, n) = x.shape[2:], B.shape[2:]
    rows = stretch.rows.stop - stretch.rows.start
    nothing = dt.new_zeros(rows * g, n, h // g * p)
    return _state_like(initial, stretch.state_in, nothing, g)


def _state_like(states: Tensor | None, which: slice | None, like_knm: Tensor, g: int) -> Tensor:
    """States given as (s, h, p, n), or zeros, laid out for products: (k, n, heads times p)."""
    if states is None or which is None:
        return torch.zeros_like(like_knm)
    states_rgjpn: Tensor = states[which].unflatten(1, (g, -1))
    return states_rgjpn.flatten(2, 3).transpose(2, 3).flatten(0, 1).contiguous()


def _as_public(state_knm: Tensor, like_shpn: Tensor, g: int) -> Tensor:
    """States as (r, h, p, n) again."""
    return state_knm.mT.reshape(-1, *like_shpn.shape[1:])


def _minus_infinity_above(steps: int, device: torch.device) -> Tensor:
    """(q, q), 0 up to the diagonal: what comes later does not count."""
    full = torch.full((steps, steps), float("-inf"), dtype=torch.float64, device=device)
    return full.triu_(1)
