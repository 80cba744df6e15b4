"""The passes of Mamba-2's scan, which some programs import from `ssd_combined` by private names.

Results depend on chunk_size only in the shapes of what the forward pass keeps.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anymamba import ops
from anymamba.dropin.common.gradients import filled, gradients
from anymamba.dropin.common.ssd_parts import ANY_SIZE, NO_LIMIT, step_sizes, with_padding
from anymamba.dropin.dispatch import by_device

in_ssd_combined = partial(by_device, module="mamba_ssm.ops.triton.ssd_combined")


@in_ssd_combined
@torch.no_grad()
def _mamba_chunk_scan_combined_fwd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
) -> tuple[Tensor | None, ...]:
    """The forward pass of `mamba_chunk_scan_combined`, whose arguments these are.

    Returns:
        The output; with z the output before the gate, else None; step sizes and the running sums of
        step size times A in each chunk, (batch, nheads, chunks, chunk_size); the states before each
        chunk, (batch, chunks, nheads, headdim, dstate); the last states; and with cu_seqlens those
        of each packed sequence.
    """
    steps = step_sizes(dt, dt_bias, dt_softplus, dt_limit)
    state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3], dtype=steps.dtype)
    state = state if initial_states is None else state.copy_(initial_states)
    outs, states = [], []
    for start in range(0, x.shape[1], chunk_size):
        now = slice(start, start + chunk_size)
        states.append(state)
        index = None if seq_idx is None else seq_idx[:, now]
        if seq_idx is not None and start:
            goes_on = seq_idx[:, start] == seq_idx[:, start - 1]
            state = state * goes_on[:, None, None, None]
        inputs = (x[:, now], steps[:, now], A, B[:, now], C[:, now], D)
        out, state = ops.ssd(
            *inputs, dt_limit=ANY_SIZE, initial_state=state, seq_idx=index, return_last_state=True
        )
        outs.append(out)
    before_gate = torch.cat(outs, 1)
    out = before_gate if z is None else (before_gate * F.silu(z.to(steps.dtype))).to(x.dtype)
    chunked = F.pad(steps, (0, 0, 0, -x.shape[1] % chunk_size)).mT
    dt_out = chunked.unflatten(2, (-1, chunk_size))
    sums = (dt_out * A[:, None, None]).cumsum(-1)
    kept = (out, None if z is None else before_gate, dt_out, sums)
    returned = (*kept, torch.stack(states, 1).to(C.dtype), state)
    if cu_seqlens is None:
        return returned
    _, varlen_states = ops.ssd(
        *(x, steps, A, B, C),
        dt_limit=ANY_SIZE,
        cu_seqlens=with_padding(cu_seqlens, x.shape[1]),
        return_last_state=True,
    )
    return (*returned, varlen_states[: len(cu_seqlens) - 1])


@in_ssd_combined
def _mamba_chunk_scan_combined_bwd(
    dout: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    out: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dfinal_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    dx: Tensor | None = None,
    ddt: Tensor | None = None,
    dB: Tensor | None = None,
    dC: Tensor | None = None,
    dz: Tensor | None = None,
    recompute_output: bool = False,
) -> tuple[Tensor | None, ...]:
    """The backward pass of `mamba_chunk_scan_combined`.

    Returns:
        The gradients of x, dt, A, B, C, D, z, dt_bias and initial_states, None for what was not
        given; with recompute_output the output.
    """

    def scan(*tensors: Any) -> tuple[Tensor, Tensor]:
        x, dt, A, B, C, D, z, dt_bias, states = tensors
        y, last = ops.ssd(
            *(x, dt, A, B, C, D, z, dt_bias, dt_softplus),
            dt_limit=dt_limit,
            initial_state=states,
            seq_idx=seq_idx,
            return_last_state=True,
        )
        return y, last

    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_states)
    outputs, found = gradients(scan, inputs, [dout, dfinal_states])
    places = (dx, ddt, None, dB, dC, None, dz, None, None)
    returned = tuple(filled(place, of) for place, of in zip(places, found, strict=True))
    return (*returned, outputs[0]) if recompute_output else returned
