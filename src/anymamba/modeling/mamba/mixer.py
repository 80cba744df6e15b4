"""The selective state space of one layer, between its two projections.

Shapes: see the legend in `anymamba.modeling.mamba.model`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN, SiLUActivation

from anymamba.layers import MambaLayer, convolve, draw_step_bias, s4d_real
from anymamba.modeling.cache import MambaCache
from anymamba.modeling.config import MambaConfig
from anymamba.modeling.packing import Layout, pack_batch
from anymamba.modeling.renaming import takes_cache_params
from anymamba.modeling.state import LayerState
from anymamba.ops.fusable import fusable

fusable(SiLUActivation, function="silu")


@fusable
class MambaMixer(MambaLayer):
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
        self._init_projections()
        self._init_state_space()

    def _init_projections(self) -> None:
        for layer in (self.in_proj, self.x_proj, self.out_proj, self.conv1d):
            init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
            if layer.bias is not None:
                init.zeros_(layer.bias)
        if self.config.rescale_prenorm_residual:
            # GPT-2's rule: the variance of the residual sum must not grow with depth.
            bound = 1 / math.sqrt(self.out_proj.in_features * self.config.num_hidden_layers)
            init.uniform_(self.out_proj.weight, -bound, bound)

    def _init_state_space(self) -> None:
        """S4D-real A, D of ones, and step sizes log-uniform in [time_step_min, time_step_max]."""
        config = self.config
        init.copy_(self.A_log, s4d_real(*self.A_log.shape))
        init.ones_(self.D)
        bound = self.time_step_rank**-0.5 * config.time_step_scale
        if config.time_step_init_scheme == "constant":
            init.constant_(self.dt_proj.weight, bound)
        else:
            init.uniform_(self.dt_proj.weight, -bound, bound)
        steps = (config.time_step_min, config.time_step_max, config.time_step_floor)
        bias_e = draw_step_bias(config.intermediate_size, *steps, dtype=torch.float32)
        init.copy_(self.dt_proj.bias, bias_e)

    @takes_cache_params
    def forward(
        self,
        hidden_states: Tensor,
        cache: MambaCache | LayerState | None = None,
        attention_mask: Tensor | None = None,
        *,
        packed: Layout | None = None,
    ) -> Tensor:
        """Mix along time.

        Args:
            hidden_states: (b, l, d), or (1, t, d) where packed.
            cache: the state before the first position; overwritten with the state after
                the last. Of a whole model's cache, layer `layer_idx`.
            attention_mask: (b, l or more) of 0 and 1, as in `MambaModel.forward`.
            packed: how the row holds the batch's sequences, in place of a mask.

        Returns:
            (b, l, d) in the type of out_proj's result.

        Raises:
            InputError: the mask does not fit, or the cache has no such layer.
        """
        state = cache.layer(self.layer_idx) if isinstance(cache, MambaCache) else cache
        if attention_mask is not None:
            batch, length, _ = hidden_states.shape
            marked = pack_batch(batch, length, hidden_states.device, attention_mask)
            if marked is not None:
                return marked.unpack(self._mix(marked.pack(hidden_states), state, marked))
        return self._mix(hidden_states, state, packed)

    @property
    def _fallback(self) -> str:
        return "mambapy" if self.config.use_mambapy else "reference"

    def _convolve(  # type: ignore[override]
        self, x_ble: Tensor, state: LayerState | None, packed: Layout | None
    ) -> Tensor:
        cu_seqlens = None if packed is None else packed.cu_seqlens
        if state is None:
            return convolve(self.conv1d, self.act, x_ble, cu_seqlens=cu_seqlens)[0]
        old = _readable(state.window_bek.to(x_ble.device))
        window = old if packed is None else packed.states_before(old)
        x_conv_ble, new = convolve(self.conv1d, self.act, x_ble, window, cu_seqlens=cu_seqlens)
        assert new is not None
        new = new if packed is None else packed.windows_after(old, x_ble, new)
        state.window_bek.copy_(new.detach())
        return x_conv_ble

    def _scan(  # type: ignore[override]
        self, inputs: tuple[Any, ...], state: LayerState | None, packed: Layout | None
    ) -> Tensor:
        cu_seqlens = old = initial = None
        if state is not None:
            old = initial = _readable(state.state_ben.to(inputs[0].device))
        if packed is not None:
            x_ble, delta_ble, *rest = inputs
            inputs, cu_seqlens = (x_ble, packed.steps(delta_ble), *rest), packed.cu_seqlens
            initial = None if old is None else packed.states_before(old)
        y_ble, new = self._scan_from(inputs, initial, state is not None, cu_seqlens)
        if state is not None and old is not None and new is not None:
            new = new if packed is None else packed.states_after(old, new)
            state.state_ben.copy_(new.detach())
        return y_ble


def _readable(state: Tensor) -> Tensor:
    """A state as an input: its own copy where autograd keeps it, for the cache is overwritten."""
    return state.clone() if torch.is_grad_enabled() else state
