"""Random inputs for the operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def scan_inputs(
    b: int,
    l: int,
    e: int,
    n: int,
    *,
    groups: int | None = None,
    extras: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    """All arguments of `selective_scan` as a dict; with `extras` D, z, bias and softplus too."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    shape_of_B = (b, l, n) if groups is None else (b, l, groups, n)
    inputs: dict[str, Any] = {
        "x_ble": normal(b, l, e).to(dtype),
        "delta_ble": (normal(b, l, e) - (1 if extras else -3)).to(dtype),
        "A_en": -torch.rand(e, n, generator=g) * n,
        "B_bln": normal(*shape_of_B).to(dtype),
        "C_bln": normal(*shape_of_B).to(dtype),
    }
    if dtype == torch.float64:
        inputs["A_en"] = inputs["A_en"].double()
    if extras:
        wide = torch.promote_types(dtype, torch.float32)
        inputs |= {
            "D_e": normal(e).to(wide),
            "z_ble": normal(b, l, e).to(dtype),
            "delta_bias_e": normal(e).to(wide),
            "delta_softplus": True,
        }
    else:
        inputs["delta_ble"] = inputs["delta_ble"].abs() * 0.1
    return inputs
