"""The compiled extension of `mamba_ssm`, which programs import under its own name.

Its two functions are the passes of `selective_scan_fn`. As with the original they know nothing of
autograd: programs wrap them in an autograd function of their own.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from anymamba.dropin.common.gradients import filled, gradients
from anymamba.dropin.common.ssd_parts import step_sizes
from anymamba.dropin.dispatch import by_device
from anymamba.dropin.mamba_ssm.ops.selective_scan_interface import (
    scan_with_state,
    selective_scan_fn,
)

__all__ = ["bwd", "fwd"]

CHUNK_STEPS = 2048
"""After how many steps the original keeps the state, for its backward pass."""


@by_device
@torch.no_grad()
def fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> list[Tensor]:
    """The forward pass of `selective_scan_fn`, with what its backward pass needs.

    Args:
        u, delta, A, B, C, D, z, delta_bias, delta_softplus: as in `selective_scan_fn`.

    Returns:
        The output before the gate, (batch, dim, seqlen); the states after each chunk of 2048
        steps, (batch, dim, chunks, 2 * dstate) in the precision of A, where each state stands
        behind the product of its decays since the first step; with z the gated output as well.

    Raises:
        InputError: a shape does not fit the others.

    Example:
        >>> u, delta = torch.ones(1, 2, 3), torch.ones(1, 2, 3)
        >>> A, B, C = torch.zeros(2, 4), torch.ones(1, 1, 4, 3), torch.ones(1, 1, 4, 3)
        >>> out, x = fwd(u, delta, A, B, C, None, None, None, False)
        >>> out[0, 0].tolist(), x[0, 0, -1, 1::2].tolist()
        ([4.0, 8.0, 12.0], [3.0, 3.0, 3.0, 3.0])
    """
    outs, states = [], []
    state: Tensor | None = None
    for start in range(0, u.shape[2], CHUNK_STEPS):
        chunk = slice(start, start + CHUNK_STEPS)
        maps = (_columns(B, A, chunk), _columns(C, A, chunk))
        inputs = (u[..., chunk], delta[..., chunk], A, *maps, D, None, delta_bias)
        out, state = scan_with_state(*inputs, delta_softplus, backend=None, initial_state=state)
        outs.append(out)
        states.append(state)
    if not outs:
        nothing = A.new_zeros(*u.shape[:2], 0, 2 * A.shape[1])
        return [u.clone(), nothing] if z is None else [u.clone(), nothing, z.clone()]
    out = torch.cat(outs, 2) if len(outs) > 1 else outs[0]
    decays = _decays(delta, A, delta_bias, delta_softplus)
    pairs = torch.stack([decays.to(A.dtype), torch.stack(states, 2).to(A.dtype)], -1)
    kept = [out, pairs.flatten(-2)]
    if z is not None:
        wide = torch.promote_types(out.dtype, torch.float32)
        kept.append((out.to(wide) * F.silu(z.to(wide))).to(out.dtype))
    return kept


@by_device
def bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    x: Tensor | None,
    out: Tensor | None,
    dz: Tensor | None,
    delta_softplus: bool,
    recompute_out_z: bool,
) -> list[Tensor | None]:
    """The backward pass of `selective_scan_fn`.

    Args:
        u, delta, A, B, C, D, z, delta_bias, delta_softplus: as in `selective_scan_fn`.
        dout: the gradient of its output, like u.
        x, out: what `fwd` returned. Not needed here: the states are computed again.
        dz: takes the gradient of z, if it is given.
        recompute_out_z: whether to return the gated output as well. Needs z.

    Returns:
        The gradients of u, delta, A, B, C, D and delta_bias, None for what was not given; with z
        its gradient; with recompute_out_z the gated output.

    Raises:
        InputError: a shape does not fit the others.

    Example:
        >>> u, delta = torch.ones(1, 2, 3), torch.ones(1, 2, 3)
        >>> A, B, C = torch.zeros(2, 4), torch.ones(1, 1, 4, 3), torch.ones(1, 1, 4, 3)
        >>> du, *_ = bwd(
        ...     u, delta, A, B, C, None, None, None, torch.ones_like(u), None, None, None, False,
        ...     False,
        ... )
        >>> du[0, 0].tolist()
        [12.0, 8.0, 4.0]
    """

    def scan(*tensors: Any) -> Tensor:
        u, delta, A, B, C, D, z, bias = tensors
        return cast(Tensor, selective_scan_fn(u, delta, A, B, C, D, z, bias, delta_softplus))

    (out_z,), found = gradients(scan, (u, delta, A, B, C, D, z, delta_bias), [dout])
    *before_z, of_z, of_bias = found
    returned = [*before_z, of_bias]
    if z is not None:
        returned.append(filled(dz, of_z))
        if recompute_out_z:
            returned.append(out_z)
    return returned


def _columns(B: Tensor, A: Tensor, chunk: slice) -> Tensor:
    """The steps of a chunk, of a B or C that depends on the step."""
    if B.ndim == 2:
        return B
    numbers = 2 if A.is_complex() else 1
    return B[..., numbers * chunk.start : numbers * chunk.stop]


def _decays(delta: Tensor, A: Tensor, delta_bias: Tensor | None, delta_softplus: bool) -> Tensor:
    """exp(A * sum of the step sizes) up to the end of each chunk, (b, e, chunks, n)."""
    steps = step_sizes(delta.mT, delta_bias, delta_softplus).mT
    totals = torch.stack([part.sum(-1) for part in steps.split(CHUNK_STEPS, -1)], -1).cumsum(-1)
    return torch.exp(totals[..., None] * A[:, None])
