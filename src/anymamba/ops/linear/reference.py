"""The matrix product in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight_nk: Tensor, bias_n: Tensor | None) -> Tensor:
    """Arguments and returns as in `anymamba.ops.linear`."""
    bias = None if bias_n is None else bias_n.to(x.dtype)
    return F.linear(x, weight_nk.to(x.dtype), bias)
