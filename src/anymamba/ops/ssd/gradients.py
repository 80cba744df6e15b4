"""The gradients of the state space duality, chunk by chunk in reverse.

Letters as in `anymamba.ops.ssd.chunk`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anymamba.ops.ssd.chunk import Chunk, Inputs, batched_product, flat


class Gradients:
    """The gradients of all inputs, filled chunk by chunk.

    Args:
        inputs: of the forward pass.
        found: a tensor for each gradient, None for an input of None.
    """

    def __init__(self, inputs: Inputs, found: Sequence[Any]) -> None:
        self._A, self._D = inputs.A, inputs.D
        self.dx, self.ddt, self._dA, self.dB, self.dC, self.dD, self.dinitial = found
        self.dA = torch.zeros_like(inputs.A, dtype=torch.float64)
        for tensor in (self.dD, self.dinitial):
            if tensor is not None:
                tensor.zero_()

    def finish(self) -> None:
        """Write what was summed in float64."""
        self._dA.copy_(self.dA)

    def of_chunk(
        self,
        at: tuple[slice, slice],
        chunk: Chunk,
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
        drive_kqm = flat(chunk.x_rgqjp * chunk.weights_rgqj[..., None])
        dB_kqn.baddbmm_(drive_kqm, dstate_knm.mT)
        to_weights_rgqj = (chunk.x_rgqjp * to_x_rgqjp).sum(-1)
        ddt_rgqj += to_weights_rgqj * chunk.to_end_rgqj
        to_decays_rgqj = (to_weights_rgqj * chunk.weights_rgqj).double()
        dsums_rgqj -= to_decays_rgqj
        decayed_knm = chunk.decayed(dstate_knm)
        r, g, _, j = dsums_rgqj.shape
        kept_rgj = (decayed_knm * state_knm).view(r, g, -1, j, dx_rgqjp.shape[-1]).sum((2, 4))
        dsums_rgqj[:, :, -1] += to_decays_rgqj.sum(2) + kept_rgj

        # Out of the state that it started from: exp(a_t) C_t S.
        from_y_kqm = flat(dy_rgqjp * chunk.from_start_rgqj[..., None])
        past_kqm = torch.bmm(chunk.C_kqn, state_knm)
        dsums_rgqj += (from_y_kqm * past_kqm).view(dx_rgqjp.shape).sum(-1)
        dC_kqn.baddbmm_(from_y_kqm, state_knm.mT)

        self._write(at, chunk, dy_rgqjp, dx_rgqjp, dB_kqn, dC_kqn)
        self._through_sums(at, chunk, ddt_rgqj, dsums_rgqj)
        return decayed_knm.baddbmm_(chunk.C_kqn.mT, from_y_kqm)

    def _write(
        self,
        at: tuple[slice, slice],
        chunk: Chunk,
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
        self, at: tuple[slice, slice], chunk: Chunk, ddt_rgqj: Tensor, dsums_rgqj: Tensor
    ) -> None:
        """A step's dt A is part of its own sum and of all later ones."""
        dproduct_rgqj = dsums_rgqj.flip(2).cumsum(2).flip(2)
        A_g1j = self._A.double().view(chunk.g, 1, -1)
        chunk.in_groups(self.ddt[at]).copy_(ddt_rgqj + dproduct_rgqj * A_g1j)
        self.dA += (dproduct_rgqj * chunk.dt_rgqj).sum((0, 2)).flatten()


def _within(chunk: Chunk, dy_rgqjp: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, B, C, dt and the sums through (C_t B_s) exp(a_t - a_s) dt_s x_s."""
    dt_rgjq, dy_rgjqp = chunk.dt_rgjq, dy_rgqjp.transpose(2, 3)
    decays_rgjqq = chunk.decays_rgjqq()
    weights_rgjqq = (decays_rgjqq.flatten(0, 1) * chunk.scores_k1qq()).view(decays_rgjqq.shape)
    dx_rgjqp = batched_product(weights_rgjqq.mT, dy_rgjqp).mul_(dt_rgjq[..., None])

    products_rgjqq = batched_product(dy_rgjqp, chunk.x_rgqjp.transpose(2, 3).mT)
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
