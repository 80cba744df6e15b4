"""What every implementation of the state space duality takes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from anymamba.ops.segments import Segments

NO_LIMIT = (0.0, math.inf)


class SsdArguments(NamedTuple):
    """The arguments of `anymamba.ops.ssd`, checked, with one mark of the packing."""

    x_blhp: Tensor
    dt_blh: Tensor
    A_h: Tensor
    B_blgn: Tensor
    C_blgn: Tensor
    D_h: Tensor | None = None
    """(h,) or (h, p)."""
    z_blhp: Tensor | None = None
    dt_bias_h: Tensor | None = None
    dt_softplus: bool = False
    dt_limit: tuple[float, float] = NO_LIMIT
    initial_state: Tensor | None = None
    return_last_state: bool = False
    segments: Segments | None = None
    chunk_size: int | None = None


class SsdStepArguments(NamedTuple):
    """The arguments of `anymamba.ops.ssd_state_update`, in the order of `SsdArguments`."""

    x_bhp: Tensor
    dt_bh: Tensor
    A_h: Tensor
    B_bgn: Tensor
    C_bgn: Tensor
    D_h: Tensor | None
    """(h,) or (h, p)."""
    z_bhp: Tensor | None
    dt_bias_h: Tensor | None
    dt_softplus: bool
    dt_limit: tuple[float, float]
    state_bhpn: Tensor


def step_sizes(
    dt: Tensor, bias_h: Tensor | None, softplus: bool, limit: tuple[float, float]
) -> Tensor:
    """The step sizes (..., h) that a recurrence takes, in the type of dt, as `ssd` has them."""
    if bias_h is not None:
        dt = dt + bias_h.to(dt.dtype)
    if softplus:
        dt = F.softplus(dt)
    return dt.clamp(*limit) if is_limited(softplus, limit) else dt


def is_limited(softplus: bool, limit: tuple[float, float]) -> bool:
    """Whether limits can move a step size; softplus is positive already."""
    return limit != (-math.inf, math.inf) and not (softplus and limit == NO_LIMIT)
