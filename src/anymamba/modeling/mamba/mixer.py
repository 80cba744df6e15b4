"""The selective state space of one layer, between its two projections.

Shapes: see the legend in `anymamba.modeling.mamba.model`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN, SiLUActivation

from anymamba import ops
from anymamba.layers import MambaLayer, draw_step_bias, s4d_real
from anymamba.modeling.config import MambaConfig
from anymamba.modeling.mamba.stateful import StatefulMixer, fill, is_step
from anymamba.ops.fusable import fusable

fusable(SiLUActivation, function="silu")


@fusable
class MambaMixer(StatefulMixer, MambaLayer):  # type: ignore[misc]
    """The selective state space between two projections: what mixes information along time.

    Args:
        config: sizes and options.
        layer_idx: which layer of a `MambaCache` a call of the mixer itself reads and overwrites. In
            a model the place in its list of layers decides.
        initialize_mixer_weights: whether to draw initial weights; a model draws them itself.
    """

    def __init__(
        self, config: MambaConfig, layer_idx: int, initialize_mixer_weights: bool = True
    ) -> None:
        super().__init__()
        d, e, n = config.hidden_size, config.intermediate_size, config.state_size
        k, r = config.conv_kernel, int(config.time_step_rank)
        self.config = config
        self.layer_idx = layer_idx
        self.hidden_size, self.intermediate_size = d, e
        self.ssm_state_size = n
        self.conv_kernel_size = k
        self.time_step_rank = r
        self.activation = config.hidden_act
        self.act = ACT2FN[config.hidden_act]
        self.conv1d = nn.Conv1d(e, e, k, groups=e, padding=k - 1, bias=config.use_conv_bias)
        self.in_proj = nn.Linear(d, 2 * e, bias=config.use_bias)
        self.x_proj = nn.Linear(e, r + 2 * n, bias=False)
        self.dt_proj = nn.Linear(r, e, bias=True)
        self.A_log = nn.Parameter(torch.empty(e, n))
        self.D = nn.Parameter(torch.empty(e))
        self.out_proj = nn.Linear(e, d, bias=config.use_bias)
        if initialize_mixer_weights and self.A_log.device.type != "meta":
            self.init_mamba_weights()

    @torch.no_grad()
    def init_mamba_weights(self) -> None:
        """Draw the initial weights; docs/configuration.md has the table."""
        self._init_projections(self.in_proj, self.x_proj, self.out_proj, self.conv1d)
        self._init_state_space()

    def _init_state_space(self) -> None:
        """S4D-real A, D of ones, and step sizes log-uniform in [time_step_min, time_step_max]."""
        config = self.config
        fill(self.A_log, s4d_real(*self.A_log.shape))
        init.ones_(self.D)
        bound = self.time_step_rank**-0.5 * config.time_step_scale
        if config.time_step_init_scheme == "constant":
            init.constant_(self.dt_proj.weight, bound)
        else:
            init.uniform_(self.dt_proj.weight, -bound, bound)
        steps = (config.time_step_min, config.time_step_max, config.time_step_floor)
        bias_e = draw_step_bias(config.intermediate_size, *steps, dtype=torch.float32)
        fill(self.dt_proj.bias, bias_e)

    def _scan_from(
        self,
        inputs: tuple[Any, ...],
        initial_state: Tensor | None,
        return_last_state: bool,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        x_ble, delta_ble, A_en, B_bln, C_bln, D_e, z_ble, bias_e = inputs
        if initial_state is None or cu_seqlens is not None or not is_step(x_ble, initial_state):
            return super()._scan_from(inputs, initial_state, return_last_state, cu_seqlens)
        softplus = True
        step = (x_ble[:, 0], delta_ble[:, 0], A_en, B_bln[:, 0], C_bln[:, 0], D_e, z_ble[:, 0])
        y_be = ops.selective_state_update(initial_state, *step, bias_e, softplus)
        return y_be[:, None], initial_state

    @property
    def _fallback(self) -> str:
        return "mambapy" if self.config.use_mambapy else "reference"
