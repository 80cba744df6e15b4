"""A mixer between a state and the next one, whatever lies between its two projections.

Shapes: see the legend in `anymamba.modeling.mamba.model`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from anymamba.checkpoint.architecture import MAMBA
from anymamba.layers import convolve, convolve_step
from anymamba.modeling.cache import MambaCache
from anymamba.modeling.packing import Layout, pack_batch
from anymamba.modeling.renaming import takes_cache_params
from anymamba.modeling.state import LayerState


class StatefulMixer(nn.Module):
    """A mixer that continues from a cache and reads masked and packed batches.

    A subclass has the modules, `init_mamba_weights`, `_mix`, which calls `_convolve` and `_scan`,
    and `_scan_from`, which gets what `_scan` was given.

    Attributes:
        architecture: whose tensors it has.
        layer_idx: which layer of a `MambaCache` a call of the mixer itself reads and overwrites.
        conv1d, act: the causal convolution, and its activation.
    """

    architecture = MAMBA
    config: Any
    layer_idx: int
    out_proj: nn.Linear
    conv1d: nn.Conv1d
    act: nn.Module

    if TYPE_CHECKING:  # what a subclass has

        def init_mamba_weights(self) -> None: ...

        def _mix(
            self, hidden_bld: Tensor, state: LayerState | None, packed: Layout | None
        ) -> Tensor: ...

        def _scan_from(
            self,
            inputs: tuple[Any, ...],
            initial_state: Tensor | None,
            return_last_state: bool,
            cu_seqlens: Tensor | None = None,
        ) -> tuple[Tensor, Tensor | None]: ...

    def _init_projections(self, *layers: nn.Linear | nn.Conv1d) -> None:
        for layer in layers:
            init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
            if layer.bias is not None:
                init.zeros_(layer.bias)
        if self.config.rescale_prenorm_residual:
            # GPT-2's rule: the variance of the residual sum must not grow with depth.
            bound = 1 / math.sqrt(self.out_proj.in_features * self.config.num_hidden_layers)
            init.uniform_(self.out_proj.weight, -bound, bound)

    def norm_weights(self) -> dict[str, Tensor]:
        """The gains of the norms inside the mixer, by the core's names."""
        return {}

    def core_settings(self) -> dict[str, Any]:
        """What the core must know of the mixer beside its tensors, as it names them."""
        return {}

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

    def _convolve(self, x_ble: Tensor, state: LayerState | None, packed: Layout | None) -> Tensor:
        cu_seqlens = None if packed is None else packed.cu_seqlens
        if state is None:
            return convolve(self.conv1d, self.act, x_ble, cu_seqlens=cu_seqlens)[0]
        old = _readable(state.window_bek.to(x_ble.device))
        window = old if packed is None else packed.states_before(old)
        if packed is None and is_step(x_ble, old):
            y_be = convolve_step(self.conv1d, self.act, x_ble[:, 0], old)
            if old is not state.window_bek:  # a copy on another device
                state.window_bek.copy_(old)
            return y_be[:, None]
        x_conv_ble, new = convolve(self.conv1d, self.act, x_ble, window, cu_seqlens=cu_seqlens)
        assert new is not None
        new = new if packed is None else packed.windows_after(old, x_ble, new)
        state.window_bek.copy_(new.detach())
        return x_conv_ble

    def _scan(
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
            if new is not state.state_ben:  # a step advances the state in place
                state.state_ben.copy_(new.detach())
        return y_ble


def _readable(state: Tensor) -> Tensor:
    """A state as an input: its own copy where autograd keeps it, for the cache is overwritten."""
    return state.clone() if torch.is_grad_enabled() else state


def is_step(x_bl: Tensor, initial_state: Tensor | None) -> bool:
    """Whether a call reads one position that goes on from a state, which may change in place."""
    return initial_state is not None and x_bl.shape[1] == 1 and not torch.is_grad_enabled()


def fill(weight: Tensor, values: Tensor) -> None:
    """Give a weight its initial values; of a sharded one each process takes its part.

    All get the numbers of the first, for what they drew may differ.
    """
    mesh = getattr(weight, "device_mesh", None)
    if mesh is not None:
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = weight
        values = distribute_tensor(values.to(weight.device), mesh, sharded.placements)
    init.copy_(weight, values)
