"""LayerNorm and RMSNorm with a gate, over all channels or over groups of them: Mamba-2's norm.

    out = norm(x) * silu(z)     (norm_before_gate)        out = norm(x * silu(z))     (otherwise)

Computed in float32 (float64 for float64 inputs). Source: "Transformers are SSMs: Generalized Models
and Efficient Algorithms Through Structured State Space Duality" (arXiv 2405.21060), section 7.1.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from anymamba import ops
from anymamba.errors import InputError
from anymamba.ops.checks import check_shape


def gated_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """Norm rows, or groups of `group_size` channels in them, with a gate z. Differentiable.

    Args:
        x, z: (..., d).
        weight, bias: gain and offset of each channel, (d,).

    Raises:
        InputError: a shape does not fit the others, or groups do not divide d.
    """
    d = check_gated_norm(x, weight, bias, z, group_size)
    wide = torch.promote_types(x.dtype, torch.float32)
    size = d if group_size is None else group_size
    if z is not None and is_rms_norm and not norm_before_gate:
        # One operator for all: a gain of ones in groups, which differ in theirs.
        gain = weight.to(wide) if size == d else x.new_ones(size, dtype=wide)
        normed = ops.rms_norm(in_groups(x, size), gain, eps, gate=in_groups(z, size))
        out = cast(Tensor, normed).reshape(x.shape)
        out = out if size == d else out * weight.to(wide)
        return (out if bias is None else out + bias.to(wide)).to(x.dtype)
    gate = None if z is None else F.silu(z.to(wide))
    rows = x.to(wide)
    if gate is not None and not norm_before_gate:
        rows = rows * gate
    gain, offset = weight.to(wide), None if bias is None else bias.to(wide)
    if size == d:
        out = _normed(rows, gain, offset, eps, is_rms_norm)
    else:
        groups, ones = in_groups(rows, size), rows.new_ones(size)
        out = _normed(groups, ones, None, eps, is_rms_norm).reshape(x.shape) * gain
        out = out if offset is None else out + offset
    if gate is not None and norm_before_gate:
        out = out * gate
    return out.to(x.dtype)


def _normed(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    if not rms:
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    out = cast(Tensor, ops.rms_norm(x, weight, eps))
    return out if bias is None else out + bias


def in_groups(x: Tensor, group_size: int) -> Tensor:
    """(..., d) as (..., groups, group_size)."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // group_size, group_size)


def check_gated_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, group_size: int | None
) -> int:
    """The number of channels, after all shapes were found to fit it.

    Raises:
        InputError: one does not fit.
    """
    d = x.shape[-1]
    check_shape("layernorm_fn", "weight", weight, (d,))
    check_shape("layernorm_fn", "bias", bias, (d,))
    check_shape("layernorm_fn", "z", z, tuple(x.shape))
    if group_size is not None and (group_size < 1 or d % group_size):
        raise InputError(f"layernorm_fn: groups of {group_size} channels do not divide all {d}")
    return d
