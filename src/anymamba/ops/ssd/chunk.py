"""One chunk of the state space duality: its inputs in groups, its decays, its products.

Letters beyond `anymamba.ops.ssd`'s: r rows of the batch, g groups, j heads of a group, q steps of
a chunk, k = r times g, m = j times p.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from anymamba.ops.segments import segments_from_table

# Rows are taken together as long as a chunk of them, in numbers, stays in the second-level cache.
_CHUNK_NUMBERS = 1 << 17
# exp(-40) is 4e-18: beside the 1 with which a step meets itself, less than float64's rounding.
_SMALLEST, _TINY = -40.0, 4.3e-18


class Inputs(NamedTuple):
    """What the operator `anymamba::ssd` takes."""

    x: Tensor  # (b, l, h, p)
    dt: Tensor  # (b, l, h), after bias, softplus and limits
    A: Tensor  # (h,)
    B: Tensor  # (b, l, g, n)
    C: Tensor  # (b, l, g, n)
    D: Tensor | None  # (h, p) or (h, 1)
    initial: Tensor | None  # (n_states, h, p, n)
    segments: Tensor | None  # (5, s)
    n_states: int
    most_steps: int

    def chunk_steps(self) -> int:
        """How many steps all chunks but the last of a segment have."""
        return min(self.most_steps, max(1, self.x.shape[1]))


@dataclass(frozen=True)
class Segment:
    """Rows and steps over which states run on, and which states go in and come out."""

    rows: slice
    chunks: list[tuple[slice, slice]]
    """Pairs (rows, steps), in order."""
    state_in: slice | None
    state_out: slice | None

    def initial_state(self, inputs: Inputs) -> Tensor:
        """The state that it starts from, laid out for products."""
        (h, p), (g, n) = inputs.x.shape[2:], inputs.B.shape[2:]
        rows = self.rows.stop - self.rows.start
        zeros_knm = inputs.dt.new_zeros(rows * g, n, h // g * p)
        return laid_out(inputs.initial, self.state_in, zeros_knm, g)


def walked_segments(inputs: Inputs) -> Iterator[Segment]:
    """The segments of packed rows; of others, as many whole rows at once as a cache holds."""
    b, l, h, p = inputs.x.shape
    steps = inputs.chunk_steps()

    def chunks(rows: slice, start: int, stop: int) -> list[tuple[slice, slice]]:
        borders = range(start, stop, steps)
        return [(rows, slice(at, min(at + steps, stop))) for at in borders]

    def only(index: int) -> slice | None:
        return slice(index, index + 1) if index >= 0 else None

    segments = segments_from_table(inputs.segments, inputs.n_states)
    if segments is None:
        n_rows = max(1, _CHUNK_NUMBERS // max(1, steps * h * p))
        for at in range(0, b, n_rows):
            rows = slice(at, min(at + n_rows, b))
            yield Segment(rows, chunks(rows, 0, l), rows, rows)
        return
    for row, start, stop, state_in, state_out in segments:
        rows = slice(row, row + 1)
        yield Segment(rows, chunks(rows, start, stop), only(state_in), only(state_out))


class Chunk:
    """A chunk's inputs in groups, and the decays between its steps and its two ends."""

    def __init__(self, inputs: Inputs, at: tuple[slice, slice], later: Tensor) -> None:
        x, dt, A, B, C = inputs[:5]
        steps = at[1].stop - at[1].start
        self._later = later[:steps, :steps]
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
        self.from_start_rgqj = decay(sums_rgqj, wide)
        self.to_end_rgqj = decay(end_rg1j - sums_rgqj, wide)
        self.through_rg1j = decay(end_rg1j, wide)
        self.weights_rgqj = self.to_end_rgqj * self.dt_rgqj

    def in_groups(self, tensor: Tensor) -> Tensor:
        """A view of (r, q, h, ...) as (r, g, q, j, ...)."""
        grouped: Tensor = tensor.unflatten(2, (self.g, -1))
        return grouped.transpose(1, 2)

    def decays_rgjqq(self) -> Tensor:
        """exp(a_t - a_s) for s <= t, else 0."""
        between = self._sums_rgjq[..., None] - self._sums_rgjq[..., None, :]
        between += self._later
        return decay(between, self.dt_rgqj.dtype)

    def scores_k1qq(self) -> Tensor:
        """C_t B_s, for all heads of a group."""
        return torch.bmm(self.C_kqn, self.B_kqn.mT)[:, None]

    def outputs_rgqjp(self, state_knm: Tensor) -> Tensor:
        """y without the skip connection."""
        weights = self.decays_rgjqq()
        weights.flatten(0, 1).mul_(self.scores_k1qq())
        weights *= self.dt_rgjq[..., None, :]
        within_rgjqp = batched_product(weights, self.x_rgqjp.transpose(2, 3))
        past_rgqjp = torch.bmm(self.C_kqn, state_knm).view(self.x_rgqjp.shape)
        return within_rgjqp.transpose(2, 3).addcmul(past_rgqjp, self.from_start_rgqj[..., None])

    def last_state(self, state_knm: Tensor) -> Tensor:
        """The state after the chunk."""
        state = self.decayed(state_knm)
        drive_kqm = flat(self.x_rgqjp * self.weights_rgqj[..., None])
        return state.baddbmm_(self.B_kqn.mT, drive_kqm)

    def decayed(self, state_knm: Tensor) -> Tensor:
        """A state times the decay over the whole chunk."""
        r, g, _, j = self.through_rg1j.shape
        state = state_knm.view(r, g, -1, j, self.x_rgqjp.shape[-1])
        return (state * self.through_rg1j[..., None]).view(state_knm.shape)


def decay(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(exponent), and 0 where that is nothing beside 1.

    Products of such numbers reach the denormal ones, for which processors take many times longer.
    """
    found = exponent.to(dtype).clamp(min=_SMALLEST).exp_()
    return F.threshold(found, _TINY, 0.0, inplace=True)


def batched_product(a: Tensor, b: Tensor) -> Tensor:
    """A product for each of the (r, g, j); only copies where they do not lie evenly."""
    return torch.bmm(a.flatten(0, 2), b.flatten(0, 2)).view(*a.shape[:-1], b.shape[-1])


def flat(tensor_rgqjp: Tensor) -> Tensor:
    """As (k, q, m)."""
    return tensor_rgqjp.flatten(3, 4).flatten(0, 1)


def laid_out(states: Tensor | None, which: slice | None, like_knm: Tensor, g: int) -> Tensor:
    """States given as (s, h, p, n), or zeros, laid out for products: (k, n, m)."""
    if states is None or which is None:
        return torch.zeros_like(like_knm)
    states_rgjpn: Tensor = states[which].unflatten(1, (g, -1))
    return states_rgjpn.flatten(2, 3).transpose(2, 3).flatten(0, 1).contiguous()


def later_steps(inputs: Inputs) -> Tensor:
    """(q, q), 0 up to the diagonal and -inf above: what comes later does not count."""
    size = (inputs.chunk_steps(),) * 2
    full = torch.full(size, float("-inf"), dtype=torch.float64, device=inputs.x.device)
    return full.triu_(1)
