"""The product with a quantized weight in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from anymamba.ops.tracing import in_chosen_types
from anymamba.renamed import old_names

# A group of smaller numbers counts as zeros: 127 / most would leave float32.
_SMALLEST = 2.0**-100

__getattr__ = old_names(__name__)


def dequantize(q: Tensor, scales: Tensor, minima: Tensor | None, k: int) -> Tensor:
    """The weight in float32, (n, k).

    Args:
        q: uint8, (n, k) for 8 bits or (n, k / 2) for 4.
        scales: (n, k / group).
        minima: the same, or None where zero lies in the middle.
        k: the columns of the weight.
    """
    n, groups = scales.shape
    group = k // groups
    bits = 8 if q.shape[1] == k else 4
    if bits == 4:
        halves = q.view(n, groups, group // 2)
        q = torch.cat([halves & 15, halves >> 4], -1)
    numbers = q.reshape(n, groups, group).float()
    zero = 0 if minima is not None else 2 ** (bits - 1)
    weight = scales.float()[..., None] * (numbers - zero)
    if minima is not None:
        weight = weight + minima.float()[..., None]
    return weight.reshape(n, k)


def quantized_linear(
    x: Tensor, q: Tensor, scales: Tensor, minima: Tensor | None, bias_n: Tensor | None
) -> Tensor:
    """Arguments and returns as in `anymamba.ops.quantized_linear`."""
    k = x.shape[-1]
    weight = dequantize(q, scales, minima, k)
    values = x.float()
    # The gradient passes by the rounding.
    rounded = values + (_rounded(values.detach(), scales.shape[1]) - values).detach()
    with in_chosen_types(x.device):
        y = F.linear(rounded, weight, None if bias_n is None else bias_n.float())
    return y.to(x.dtype)


def _rounded(x: Tensor, groups: int) -> Tensor:
    """To 8 bits a number, with a scale for each group of each row."""
    parts = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    most = parts.abs().amax(-1, keepdim=True)
    inverse = torch.where(most >= _SMALLEST, 127 / most, 0)
    whole = torch.round(parts.double() * inverse.double()).float()
    return (whole * (most / 127)).reshape(x.shape)
