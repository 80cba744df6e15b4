"""The selective state space of one layer, between its two projections.

Shapes: see the legend in `anymamba.modeling.mamba.model`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN, SiLUActivation

from anymamba import ops
from anymamba.modeling.cache import MambaCache
from anymamba.modeling.config import MambaConfig
from anymamba.modeling.layer_state import LayerState
from anymamba.modeling.packing import Layout, pack_batch
from anymamba.modeling.renaming import takes_cache_params
from anymamba.ops.fusable import fusable, project, project_halves, why_not_plain

__all__ = ["MambaMixer"]

fusable(SiLUActivation, function="silu")


@fusable
class MambaMixer(nn.Module):
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
        rates_n = torch.arange(1, config.state_size + 1, dtype=torch.float32)
        init.copy_(self.A_log, torch.log(rates_n).expand(self.A_log.shape))
        init.ones_(self.D)
        bound = self.time_step_rank**-0.5 * config.time_step_scale
        if config.time_step_init_scheme == "constant":
            init.constant_(self.dt_proj.weight, bound)
        else:
            init.uniform_(self.dt_proj.weight, -bound, bound)
        low, high = math.log(config.time_step_min), math.log(config.time_step_max)
        uniform_e = torch.rand(config.intermediate_size, dtype=torch.float32)
        step_e = torch.exp(uniform_e * (high - low) + low).clamp(min=config.time_step_floor)
        # The inverse of softplus: softplus(bias) = step.
        init.copy_(self.dt_proj.bias, step_e + torch.log(-torch.expm1(-step_e)))

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

    def _mix(
        self, hidden_states: Tensor, state: LayerState | None, packed: Layout | None
    ) -> Tensor:
        x_ble, z_ble = project_halves(self.in_proj, hidden_states)
        x_ble = self._convolve(x_ble, state, packed)
        delta_blr, B_bln, C_bln = project(self.x_proj, x_ble).split(
            [self.time_step_rank, self.ssm_state_size, self.ssm_state_size], dim=-1
        )
        delta_ble, delta_bias_e = self._step_size(delta_blr)
        y_ble = self._scan(x_ble, delta_ble, B_bln, C_bln, z_ble, delta_bias_e, state, packed)
        return project(self.out_proj, y_ble)

    def _step_size(self, delta_blr: Tensor) -> tuple[Tensor, Tensor | None]:
        """Delta, and its bias apart where the weights can be read, so that it stays float32."""
        if why_not_plain(self.dt_proj, nn.Linear) is None:
            return ops.linear(delta_blr, self.dt_proj.weight), self.dt_proj.bias
        return self.dt_proj(delta_blr), None

    def _convolve(self, x_ble: Tensor, state: LayerState | None, packed: Layout | None) -> Tensor:
        window = old_window = None
        if state is not None:
            old_window = _readable(state.window_bek.to(x_ble.device))
            window = old_window if packed is None else packed.states_before(old_window)
        x_conv_ble, last = self._convolution(
            x_ble, window, None if packed is None else packed.cu_seqlens
        )
        if state is not None and old_window is not None:
            new_window = last
            if packed is not None:
                new_window = packed.windows_after(old_window, x_ble, last)
            state.window_bek.copy_(new_window.detach())
        return x_conv_ble

    def _convolution(
        self, x_ble: Tensor, window: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The convolution with its activation, and the final windows."""
        convolve = (
            self._fused_convolution
            if why_not_plain(self.conv1d, nn.Conv1d) is None
            else self._called_convolution
        )
        return convolve(x_ble, window, cu_seqlens)

    def _fused_convolution(
        self, x_ble: Tensor, window: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        fused = "silu" if self._multiplies_by_sigmoid() else None
        x_conv_ble, last = ops.causal_conv1d(
            x_ble,
            self.conv1d.weight[:, 0],
            self.conv1d.bias,
            fused,
            initial_window=window,
            return_final_window=True,
            cu_seqlens=cu_seqlens,
        )
        return (x_conv_ble if fused else self.act(x_conv_ble)), last

    def _multiplies_by_sigmoid(self) -> bool:
        """Whether the activation is SiLU, and a module that nobody has touched."""
        kind = type(self.act)
        return kind in (SiLUActivation, nn.SiLU) and why_not_plain(self.act, kind) is None

    def _called_convolution(
        self, x_ble: Tensor, window: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The same through the module's forward, for whatever stands in the convolution's place."""
        k = self.config.conv_kernel
        if cu_seqlens is None:
            pieces = [x_ble]
        else:
            pieces = list(x_ble.split(cu_seqlens.diff().tolist(), dim=1))
        outputs, windows = [], []
        for index, piece_ble in enumerate(pieces):
            before = x_ble.new_zeros(piece_ble.shape[0], x_ble.shape[2], k)
            if window is not None:
                before = (window if cu_seqlens is None else window[index, None]).to(x_ble.dtype)
            inputs_bel = torch.cat([before, piece_ble.transpose(1, 2)], 2)
            result_bel = self.conv1d(inputs_bel)[:, :, k : k + piece_ble.shape[1]]
            outputs.append(self.act(result_bel).transpose(1, 2))
            windows.append(inputs_bel[:, :, inputs_bel.shape[2] - k :])
        last = torch.cat(windows) if windows else x_ble.new_zeros(0, x_ble.shape[2], k)
        return (torch.cat(outputs, 1) if outputs else x_ble), last

    def _scan(
        self,
        x_ble: Tensor,
        delta_ble: Tensor,
        B_bln: Tensor,
        C_bln: Tensor,
        z_ble: Tensor,
        delta_bias_e: Tensor | None,
        state: LayerState | None,
        packed: Layout | None,
    ) -> Tensor:
        initial = old_state = None
        if state is not None:
            old_state = _readable(state.state_ben.to(x_ble.device))
            initial = old_state if packed is None else packed.states_before(old_state)
        y_ble, last = ops.selective_scan(
            x_ble,
            delta_ble if packed is None else packed.steps(delta_ble),
            -torch.exp(self.A_log.float()),
            B_bln,
            C_bln,
            self.D,
            z_ble,
            delta_bias_e,
            delta_softplus=True,
            initial_state=initial,
            return_last_state=True,
            cu_seqlens=None if packed is None else packed.cu_seqlens,
            fallback="mambapy" if self.config.use_mambapy else "reference",
        )
        if state is not None and old_state is not None:
            new_state = last if packed is None else packed.states_after(old_state, last)
            state.state_ben.copy_(new_state.detach())
        return y_ble


def _readable(state: Tensor) -> Tensor:
    """A state as an input: its own copy where autograd keeps it, for the cache is overwritten."""
    return state.clone() if torch.is_grad_enabled() else state
