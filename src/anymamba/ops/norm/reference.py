"""RMSNorm in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(
    x: Tensor,
    weight_d: Tensor,
    eps: float,
    residual: Tensor | None,
    residual_in_fp32: bool,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Normed rows and the sum; arguments as in `anymamba.ops.rms_norm`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    kept = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    total = x.to(wide) if residual is None else x.to(wide) + residual.to(wide)
    if gate is not None:
        total = total * F.silu(gate.to(wide))
    scale = torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + eps)
    normed = total * scale * weight_d.to(wide)
    return normed.to(weight_d.dtype), total.to(wide if residual_in_fp32 else kept)
