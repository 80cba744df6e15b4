"""The state space duality's recurrence, one step after the other: the definition to check by."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anymamba.ops.segments import Segments, count_states
from anymamba.ops.ssd.arguments import SsdStepArguments, step_sizes


def ssd_sequential(
    x_blhp: Tensor,
    dt_blh: Tensor,
    A_h: Tensor,
    B_blgn: Tensor,
    C_blgn: Tensor,
    D_hp: Tensor | None,
    initial_state: Tensor | None,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    """The definition; arguments and returns as in `anymamba.ops.ssd`, but for two.

    Args:
        dt_blh: the step sizes themselves, after bias, softplus and limits.
        D_hp: (h, p) or (h, 1).
    """
    wide = torch.promote_types(x_blhp.dtype, torch.float32)
    (b, l, h, p), (g, n) = x_blhp.shape, B_blgn.shape[2:]
    x, dt, A = x_blhp.to(wide), dt_blh.to(wide), A_h.to(wide)
    B, C = (t.to(wide).repeat_interleave(h // g, dim=2) for t in (B_blgn, C_blgn))
    n_states = count_states(segments, b)
    whole = Segments(list(range(b)), [0] * b, [l] * b, list(range(b)), list(range(b)), b)

    last = [x.new_zeros(h, p, n)] * n_states
    outputs: dict[tuple[int, int], Tensor] = {}
    for row, start, stop, state_in, state_out in segments or whole:
        state_hpn = x.new_zeros(h, p, n)
        if initial_state is not None and state_in >= 0:
            state_hpn = initial_state[state_in].to(wide)
        for t in range(start, stop):
            decay_h = torch.exp(dt[row, t] * A)
            drive_hpn = (dt[row, t, :, None] * x[row, t])[..., None] * B[row, t, :, None]
            state_hpn = decay_h[:, None, None] * state_hpn + drive_hpn
            outputs[row, t] = (state_hpn * C[row, t, :, None]).sum(-1)
        if state_out >= 0:
            last[state_out] = state_hpn
    # A row's first sequence takes its state even where it has no steps.
    y = torch.stack([outputs[key] for key in sorted(outputs)]) if outputs else x
    y = y.view(b, l, h, p) if D_hp is None else y.view(b, l, h, p) + D_hp.to(wide) * x
    states = torch.stack(last) if last else x.new_zeros(0, h, p, n)
    return y.to(x_blhp.dtype), states


@torch.no_grad()
def ssd_state_update(arguments: SsdStepArguments) -> Tensor:
    """One step, in place; arguments as in `anymamba.ops.ssd_state_update`."""
    *tensors, softplus, limit, given_state = arguments
    wide = torch.promote_types(arguments.x_bhp.dtype, torch.float32)
    found: Any = (None if tensor is None else tensor.to(wide) for tensor in (*tensors, given_state))
    x, dt, A, B, C, D, z, dt_bias, state = found
    dt_bh1 = step_sizes(dt, dt_bias, softplus, limit)[..., None]
    B_bhn, C_bhn = (t.repeat_interleave(x.shape[1] // t.shape[1], 1) for t in (B, C))
    decay_bh11 = torch.exp(dt_bh1 * A[:, None])[..., None]
    state.mul_(decay_bh11).addcmul_((dt_bh1 * x)[..., None], B_bhn[:, :, None])
    if state is not given_state:
        given_state.copy_(state)
    y: Tensor = (state @ C_bhn[..., None])[..., 0]
    if D is not None:
        y = y + (D if D.ndim == 2 else D[:, None]) * x
    if z is not None:
        y = y * F.silu(z)
    return y.to(arguments.x_bhp.dtype)
