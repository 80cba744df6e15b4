"""The state space duality's recurrence, one step after the other: the definition to check by."""

from __future__ import annotations

import torch
from torch import Tensor

from anymamba.ops.segments import Segments

__all__ = ["ssd_sequential"]


def ssd_sequential(
    x_blhp: Tensor,
    dt_blh: Tensor,
    A_h: Tensor,
    B_blgn: Tensor,
    C_blgn: Tensor,
    D_hp: Tensor | None,
    initial_states: Tensor | None,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    """The definition; arguments and returns as in `ssd.custom_operator.ssd_blocked`."""
    wide = torch.promote_types(x_blhp.dtype, torch.float32)
    (b, l, h, p), (g, n) = x_blhp.shape, B_blgn.shape[2:]
    x, dt, A = x_blhp.to(wide), dt_blh.to(wide), A_h.to(wide)
    B, C = (t.to(wide).repeat_interleave(h // g, dim=2) for t in (B_blgn, C_blgn))
    n_states = b if segments is None else segments.n_states
    whole = Segments(list(range(b)), [0] * b, [l] * b, list(range(b)), list(range(b)), b)

    last = [x.new_zeros(h, p, n)] * n_states
    outputs: dict[tuple[int, int], Tensor] = {}
    for row, start, stop, state_in, state_out in segments or whole:
        state_hpn = x.new_zeros(h, p, n)
        if initial_states is not None and state_in >= 0:
            state_hpn = initial_states[state_in].to(wide)
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
