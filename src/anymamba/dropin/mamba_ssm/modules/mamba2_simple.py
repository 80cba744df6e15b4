"""The plainer Mamba-2 layer, as `mamba_ssm.modules.mamba2_simple` has it.

Source: "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State
Space Duality" (arXiv 2405.21060), section 7.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from anymamba.dropin.forks import explained
from anymamba.dropin.mamba_ssm.modules.mamba2 import NO_LIMIT, HeadsLayer
from anymamba.errors import ConfigError
from anymamba.layers import convolve
from anymamba.ops.fusable import project

__all__ = ["Mamba2Simple"]


class Mamba2Simple(HeadsLayer):
    """Mamba-2 without what generation and parallel training add, but with learnable first states.

    Args:
        d_model, d_state, d_conv, conv_init, expand, headdim, ngroups, A_init_range, dt_min, dt_max,
            dt_init_floor, dt_limit, bias, conv_bias, chunk_size, use_mem_eff_path, device, dtype:
            as in `Mamba2`, with other defaults for d_state and headdim.
        learnable_init_states: whether the states before the first token are weights.
        activation: of the convolution; "swish" and "silu" are the same.
        layer_idx: not used.

    Raises:
        ConfigError: the sizes do not divide, or a setting is unknown.

    Example:
        >>> layer = Mamba2Simple(d_model=16, d_state=8, headdim=8)
        >>> layer(torch.randn(2, 5, 16)).shape
        torch.Size([2, 5, 16])
    """

    @explained
    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 128,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = NO_LIMIT,
        learnable_init_states: bool = False,
        activation: str = "swish",
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if activation not in ("swish", "silu"):
            raise ConfigError(f"activation is {activation!r}, expected 'swish' or 'silu'")
        super().__init__(
            *(d_model, d_state, d_conv, conv_init, expand, headdim, ngroups, A_init_range),
            *((dt_min, dt_max, dt_init_floor), dt_limit, bias, conv_bias, chunk_size),
            *(use_mem_eff_path, layer_idx, {"device": device, "dtype": dtype}),
            activation=activation,
            learnable_init_states=learnable_init_states,
        )
        self.learnable_init_states = learnable_init_states

    def forward(self, u: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        """Run the layer over sequences.

        Args:
            u: (b, l, d).
            seq_idx: (b, l) integers; state and convolution begin anew where they change.

        Returns:
            (b, l, d).
        """
        zxbcdt = project(self.in_proj, u)
        first = self.init_states.expand(len(u), -1, -1, -1) if self.learnable_init_states else None
        if self._is_one_operator():
            return self._as_one_operator(zxbcdt, seq_idx, first)
        return self._by_modules(
            zxbcdt,
            lambda xBC: convolve(self.conv1d, self.act, xBC, seq_idx=seq_idx)[0],
            partial(self._chunk_scan, initial_states=first, seq_idx=seq_idx),
        )
