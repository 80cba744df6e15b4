"""Mamba-2's mixer: the state space duality between two projections.

Shapes: b batch, l length, d model width, e inner width, h heads, p width of a head, g groups of
heads that share B and C, n states, k convolution width. Source: "Transformers are SSMs: Generalized
Models and Efficient Algorithms Through Structured State Space Duality" (arXiv 2405.21060), section
7. `anymamba.minimal_mamba2` is the specification.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from anymamba import ops
from anymamba.checkpoint.architecture import MAMBA2
from anymamba.layers import HeadSizes, at_least_float32, draw_step_bias, gated_norm, mix_heads
from anymamba.modeling.config import Mamba2Config
from anymamba.modeling.mamba.stateful import StatefulMixer, fill, is_step
from anymamba.modeling.packing import Layout
from anymamba.modeling.state import LayerState
from anymamba.ops.fusable import fusable, project


@fusable
class MambaRMSNormGated(nn.Module):
    """RMSNorm of each group's channels and a gate: norm(y silu(z)), or norm(y) silu(z).

    Args:
        hidden_size: e.
        group_size: how many neighbouring channels are normed together.
        eps: added to the mean square.
        norm_before_gate: whether the gate multiplies what was normed, rather than what is.
    """

    def __init__(
        self, hidden_size: int, group_size: int, eps: float = 1e-6, norm_before_gate: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        """(..., e) twice to (..., e), computed in float32."""
        return gated_norm(
            *(hidden_states, self.weight, None, gate, self.variance_epsilon, self.group_size),
            norm_before_gate=self.norm_before_gate,
            is_rms_norm=True,
        )


@fusable
class Mamba2Mixer(StatefulMixer):
    """The state space duality between two projections: what mixes information along time.

    Args:
        config: sizes and options.
        layer_idx: which layer of a `MambaCache` a call of the mixer itself reads and overwrites.
        initialize_mixer_weights: whether to draw initial weights; a model draws them itself.
    """

    architecture = MAMBA2

    def __init__(
        self, config: Mamba2Config, layer_idx: int, initialize_mixer_weights: bool = True
    ) -> None:
        super().__init__()
        d, e, h = config.hidden_size, config.intermediate_size, config.num_heads
        k, channels = config.conv_kernel, config.conv_channels
        self.config = config
        self.layer_idx = layer_idx
        self.hidden_size, self.intermediate_size = d, e
        self.num_heads, self.head_dim = h, config.head_dim
        self.n_groups, self.ssm_state_size = config.n_groups, config.state_size
        self.conv_kernel_size, self.conv_dim = k, channels
        self.chunk_size, self.time_step_limit = config.chunk_size, config.time_step_limit
        self.activation = config.hidden_act
        self.act = ACT2FN[config.hidden_act]
        self.in_proj = nn.Linear(d, e + channels + h, bias=config.use_bias)
        self.conv1d = nn.Conv1d(
            channels, channels, k, groups=channels, padding=k - 1, bias=config.use_conv_bias
        )
        self.dt_bias = nn.Parameter(torch.empty(h))
        self.A_log = nn.Parameter(torch.empty(h))
        self.D = nn.Parameter(torch.empty(h))
        norm = (e, e // config.n_groups, config.layer_norm_epsilon, config.gate_after_norm)
        self.norm = MambaRMSNormGated(*norm) if config.use_gated_norm else None
        self.out_proj = nn.Linear(e, d, bias=config.use_bias)
        if initialize_mixer_weights and self.A_log.device.type != "meta":
            self.init_mamba_weights()

    @torch.no_grad()
    def init_mamba_weights(self) -> None:
        """Draw the initial weights; docs/configuration.md has the table."""
        config = self.config
        self._init_projections(self.in_proj, self.out_proj, self.conv1d)
        # Rates from 1 to 16, as the authors draw them.
        fill(self.A_log, torch.empty(self.num_heads).uniform_(1, 16).log())
        init.ones_(self.D)
        if self.norm is not None:
            init.ones_(self.norm.weight)
        steps = (config.time_step_min, config.time_step_max, config.time_step_floor)
        fill(self.dt_bias, draw_step_bias(self.num_heads, *steps, dtype=torch.float32))

    def core_settings(self) -> dict[str, Any]:
        """Its groups, the limits of its step sizes, and the epsilon and place of its norm."""
        low, high = self.time_step_limit
        return {
            "mixer_eps": 0.0 if self.norm is None else self.norm.variance_epsilon,
            "groups": self.n_groups,
            "dt_limit": (float(low), float(high)),
            "norm_before_gate": self.norm is not None and self.norm.norm_before_gate,
        }

    def _mix(self, hidden_bld: Tensor, state: LayerState | None, packed: Layout | None) -> Tensor:
        sizes = HeadSizes(self.num_heads, self.head_dim, self.n_groups, self.ssm_state_size)
        A_h = -torch.exp(at_least_float32(self.A_log))

        def convolve(xBC: Tensor) -> Tensor:
            return self._convolve(xBC, state, packed)

        def scan(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, gate: Tensor | None) -> Tensor:
            return self._scan((x, dt, A_h, B, C, self.D, gate), state, packed)

        mixed = mix_heads(project(self.in_proj, hidden_bld), sizes, convolve, scan, self.norm)
        return project(self.out_proj, mixed)

    def _scan_from(
        self,
        inputs: tuple[Any, ...],
        initial_state: Tensor | None,
        return_last_state: bool,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        softplus, limits = True, (self.time_step_limit[0], self.time_step_limit[1])
        x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h, gate = inputs
        if initial_state is not None and cu_seqlens is None and is_step(x_blhp, initial_state):
            z = None if gate is None else gate[:, 0]
            step = (x_blhp[:, 0], dt_blh[:, 0], A_h, B_blgn[:, 0], C_blgn[:, 0], D_h, z)
            bias = self.dt_bias
            y_bhp = ops.ssd_state_update(initial_state, *step, bias, softplus, dt_limit=limits)
            return y_bhp[:, None], initial_state
        scanned: Any = ops.ssd(
            *(*inputs, self.dt_bias, softplus),
            dt_limit=limits,
            initial_state=initial_state,
            return_last_state=return_last_state,
            cu_seqlens=cu_seqlens,
        )
        return cast("tuple[Tensor, Tensor]", scanned) if return_last_state else (scanned, None)
