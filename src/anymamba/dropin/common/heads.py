"""How the weights of Mamba-2's heads are made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from anymamba.errors import ConfigError

__all__ = ["check_heads", "depthwise", "log_rates", "not_decayed"]


def check_heads(width: int, headdim: int, ngroups: int) -> None:
    """Check that heads fill the width, and groups the heads.

    Raises:
        ConfigError: they do not.
    """
    if width % headdim or (width // headdim) % ngroups:
        raise ConfigError(
            f"{width} inner channels cannot be split into heads of headdim={headdim} in "
            f"ngroups={ngroups}; choose a headdim that divides them and ngroups that divides the "
            "number of heads"
        )


def depthwise(
    width: int, d_conv: int, bias: bool, init: float | None, factory: dict[str, Any]
) -> nn.Conv1d:
    """A causal convolution of each channel with its own kernel."""
    conv1d = nn.Conv1d(width, width, d_conv, groups=width, padding=d_conv - 1, bias=bias, **factory)
    if init is not None:
        nn.init.uniform_(conv1d.weight, -init, init)
    return conv1d


def log_rates(nheads: int, init_range: tuple[float, float], device: Any) -> Tensor:
    """Draw the logarithms of the heads' rates of decay, in float32.

    Raises:
        ConfigError: the range is empty, or goes below zero.
    """
    low, high = init_range
    if not 0 < low <= high:
        raise ConfigError(f"A_init_range is {init_range}, expected 0 < low <= high")
    rates = torch.empty(nheads, dtype=torch.float32, device=device).uniform_(low, high)
    return torch.log(rates)


def not_decayed(tensor: Tensor) -> nn.Parameter:
    """A parameter that asks optimizers for no weight decay."""
    parameter = nn.Parameter(tensor)
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return parameter
