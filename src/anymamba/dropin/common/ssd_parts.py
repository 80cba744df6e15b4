"""What the functions of `mamba_ssm.ops.triton.ssd_combined` are made of.

The letters: b batch, l length, h heads, p channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from anymamba.dropin.causal_conv1d.causal_conv1d_interface import causal_conv1d_fn
from anymamba.errors import InputError
from anymamba.layers import HeadSizes, gated_norm
from anymamba.ops.ssd import arguments

NO_LIMIT = arguments.NO_LIMIT
ANY_SIZE = (-math.inf, math.inf)


def with_padding(cu_seqlens: Tensor, seqlen: int) -> Tensor:
    """The offsets, with those of the padding behind the last sequence if there is some."""
    if int(cu_seqlens[-1]) >= seqlen:
        return cu_seqlens
    return F.pad(cu_seqlens, (0, 1), value=seqlen)


def restart_at(seq_idx: Tensor | None, cu_seqlens: Tensor) -> bool:
    """Whether the state restarts exactly where the offsets say, so that one scan does for both."""
    inner = torch.unique(cu_seqlens[1:-1])
    if seq_idx is None:
        return not inner.numel()
    restarts = torch.nonzero(seq_idx[0, 1:] != seq_idx[0, :-1])[:, 0] + 1
    # A last sequence without steps has its own, empty, state: the row's is another.
    return bool(cu_seqlens[-1] > cu_seqlens[-2]) and torch.equal(restarts, inner.long())


def step_sizes(
    dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float] = ANY_SIZE
) -> Tensor:
    """The step sizes as the recurrence uses them, at least in float32."""
    wide = dt.to(torch.promote_types(dt.dtype, torch.float32))
    return arguments.step_sizes(wide, dt_bias, dt_softplus, dt_limit)


def sizes_of(
    name: str, zxbcdt: Tensor, weight: Tensor, D: Tensor, headdim: int | None, ngroups: int
) -> HeadSizes:
    """The sizes that the tensors have, after they were found to fit each other."""
    nheads, headdim = D.shape[0], width_of_a_head(name, D, headdim)
    dim, convolved = nheads * headdim, weight.shape[0]
    mlp = zxbcdt.shape[-1] - dim - convolved - nheads
    if zxbcdt.ndim != 3 or mlp < 0 or mlp % 2 or (convolved - dim) % (2 * ngroups):
        raise InputError(
            f"{name}: zxbcdt has shape {tuple(zxbcdt.shape)} and conv1d_weight "
            f"{tuple(weight.shape)}, expected (batch, seqlen, dim + 2 * ngroups * dstate + dim "
            f"+ nheads) and (dim + 2 * ngroups * dstate, width) with nheads={nheads}, "
            f"dim={dim}, ngroups={ngroups}"
        )
    return HeadSizes(nheads, headdim, ngroups, (convolved - dim) // (2 * ngroups))


def width_of_a_head(name: str, D: Tensor | None, headdim: int | None) -> int:
    if D is not None and D.ndim == 2:
        return D.shape[1]
    if headdim is None:
        raise InputError(f"{name}: headdim is needed where D has one axis")
    return headdim


def convolution_of(
    weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, activation: str | None
) -> Callable[[Tensor], Tensor]:
    def convolve(xBC: Tensor) -> Tensor:
        convolved = causal_conv1d_fn(xBC.mT, weight, bias, seq_idx, activation=activation)
        return cast(Tensor, convolved).mT

    return convolve


def norm_of(
    weight: Tensor | None, eps: float, group_size: int | None, norm_before_gate: bool
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Gate and norm by their weight; None where there is none."""
    if weight is None:
        return None
    options = (eps, group_size, norm_before_gate)
    return lambda y, z: gated_norm(y, weight, None, z, *options, is_rms_norm=True)


def project_out(name: str, out: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        return F.linear(out, weight, bias)
    if bias is not None:
        raise InputError(f"{name}: outproj_bias is given without outproj_weight")
    return out
