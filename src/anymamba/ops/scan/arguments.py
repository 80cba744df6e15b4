"""What every implementation of the selective scan takes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from anymamba.ops.segments import Segments


class ScanArguments(NamedTuple):
    """The arguments of `anymamba.ops.selective_scan`, checked, with one mark of the packing."""

    x_ble: Tensor
    delta_ble: Tensor
    A_en: Tensor
    B_bln: Tensor
    """(b, l, n), or (b, l, g, n) in groups; C the same."""
    C_bln: Tensor
    D_e: Tensor | None = None
    z_ble: Tensor | None = None
    delta_bias_e: Tensor | None = None
    delta_softplus: bool = False
    initial_state: Tensor | None = None
    return_last_state: bool = False
    segments: Segments | None = None
    reverse: bool = False


class StepArguments(NamedTuple):
    """The arguments of `anymamba.ops.selective_state_update`, in the order of `ScanArguments`."""

    x_be: Tensor
    delta_be: Tensor
    A_en: Tensor
    B_bn: Tensor
    """(b, n), or (b, g, n) in groups; C the same."""
    C_bn: Tensor
    D_e: Tensor | None
    z_be: Tensor | None
    delta_bias_e: Tensor | None
    delta_softplus: bool
    state_ben: Tensor


def in_groups(B: Tensor, C: Tensor, axes_without_groups: int) -> Iterator[Tensor]:
    """B and C as (..., g, n) with the same g, which kernels want, whatever each came with."""
    maps = [t.unsqueeze(-2) if t.ndim == axes_without_groups else t for t in (B, C)]
    groups = math.lcm(*(t.shape[-2] for t in maps))
    for t in maps:
        parts = groups // t.shape[-2]
        yield t if parts == 1 else t.repeat_interleave(parts, dim=-2)
