"""How the weights of the recurrence start.

Source: "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752),
section 3.6.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 where it is that already."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def draw_step_bias(n: int, dt_min: float, dt_max: float, floor: float, **factory: Any) -> Tensor:
    """Draw n biases whose softplus is log-uniform in [dt_min, dt_max], and no less than `floor`.

    Example:
        >>> steps = torch.nn.functional.softplus(draw_step_bias(100, 0.001, 0.1, 1e-4))
        >>> bool((steps > 0.0009).all() and (steps < 0.11).all())
        True
    """
    low, high = math.log(dt_min), math.log(dt_max)
    steps = torch.exp(torch.rand(n, **factory) * (high - low) + low).clamp(min=floor)
    # log(exp(s) - 1), the inverse of softplus, written so that it does not cancel for a small s.
    return steps + torch.log(-torch.expm1(-steps))


def s4d_real(channels: int, states: int, device: Any = None) -> Tensor:
    """The logarithms (e, n) of S4D-Real's decay rates 1, 2, ... for each channel, in float32.

    Example:
        >>> s4d_real(2, 3).exp()[0].tolist()
        [1.0, 2.0, 3.0]
    """
    rates_n = torch.arange(1, states + 1, dtype=torch.float32, device=device)
    return torch.log(rates_n).repeat(channels, 1)
