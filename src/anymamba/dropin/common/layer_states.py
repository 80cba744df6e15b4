"""What the recurrent layers share: their step's bias, their convolution, and their states.

A state of the convolution is its last inputs, oldest first, (b, e, k). Source: "Mamba: Linear-Time
Sequence Modeling with Selective State Spaces" (arXiv 2312.00752), sections 3.4 to 3.6.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anymamba.dropin.causal_conv1d.causal_conv1d_interface import (
    causal_conv1d_fn,
    causal_conv1d_update,
)
from anymamba.errors import InputError
from anymamba.ops.fusable import why_not_plain

if TYPE_CHECKING:
    from anymamba.dropin.mamba_ssm.utils.generation import InferenceParams

__all__ = [
    "CachedStates",
    "all_plain",
    "at_least_float32",
    "convolve",
    "convolve_step",
    "last_inputs",
    "one_token",
    "step_bias",
]

States = tuple[Tensor, Tensor]


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 where it is that already."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def step_bias(n: int, dt_min: float, dt_max: float, floor: float, **factory: Any) -> Tensor:
    """Draw biases whose softplus is spread evenly, by its logarithm, from dt_min to dt_max.

    Args:
        n: how many.
        dt_min, dt_max, floor: the range of the step size, and the least it may be.
        factory: device and dtype.

    Returns:
        (n,).

    Example:
        >>> steps = F.softplus(step_bias(100, 0.001, 0.1, 1e-4))
        >>> bool((steps > 0.0009).all() and (steps < 0.11).all())
        True
    """
    low, high = math.log(dt_min), math.log(dt_max)
    steps = torch.exp(torch.rand(n, **factory) * (high - low) + low).clamp(min=floor)
    # log(exp(s) - 1), written so that it does not cancel where s is small.
    return steps + torch.log(-torch.expm1(-steps))


def all_plain(*modules: nn.Module) -> bool:
    """Whether the weights of these linear layers and convolutions say all that they do."""
    kinds = (nn.Conv1d if isinstance(module, nn.Conv1d) else nn.Linear for module in modules)
    return all(why_not_plain(m, kind) is None for m, kind in zip(modules, kinds, strict=True))


def one_token(hidden_states: Tensor) -> Tensor:
    """(b, 1, d) as (b, d); a step takes one token.

    Raises:
        InputError: there are more tokens, or none.
    """
    if hidden_states.ndim != 3 or hidden_states.shape[1] != 1:
        raise InputError(
            f"a step takes hidden_states of shape (b, 1, d), got {tuple(hidden_states.shape)}; "
            "give the prompt in one call with seqlen_offset 0, then one token a call"
        )
    return hidden_states.squeeze(1)


def convolve(
    conv1d: nn.Module, x_ble: Tensor, activation: str | None, seq_idx: Tensor | None = None
) -> Tensor:
    """x through a layer's causal convolution.

    Args:
        conv1d: the depthwise `nn.Conv1d` with padding k - 1, or what has taken its place.
        x_ble: (b, l, e).
        activation: None or "silu".
        seq_idx: (b, l), where packed sequences begin anew.

    Returns:
        (b, l, e).
    """
    if seq_idx is not None or why_not_plain(conv1d, nn.Conv1d) is None:
        x_bel = x_ble.transpose(1, 2)
        weight_ek, bias_e = _kernel(conv1d)
        y_bel = causal_conv1d_fn(x_bel, weight_ek, bias_e, seq_idx, activation=activation)
        return cast(Tensor, y_bel).transpose(1, 2)
    y_ble = conv1d(x_ble.transpose(1, 2))[..., : x_ble.shape[1]].transpose(1, 2)
    return F.silu(y_ble) if activation else y_ble


def _kernel(conv1d: Any) -> tuple[Tensor, Tensor | None]:
    return conv1d.weight.squeeze(1), conv1d.bias


def convolve_step(
    conv1d: nn.Module, x_be: Tensor, conv_state: Tensor, activation: str | None
) -> Tensor:
    """One token through a layer's causal convolution; conv_state takes it in, in place.

    Args:
        conv1d, activation: as in `convolve`.
        x_be: (b, e).
        conv_state: the last k inputs, (b, e, k).

    Returns:
        (b, e).
    """
    if why_not_plain(conv1d, nn.Conv1d) is None:
        return causal_conv1d_update(x_be, conv_state, *_kernel(conv1d), activation)
    conv_state.copy_(torch.cat([conv_state[..., 1:], x_be.unsqueeze(-1)], dim=-1))
    # Of the outputs over the padded window, the one that sees it whole.
    y_be: Tensor = conv1d(conv_state.to(x_be.dtype))[..., conv_state.shape[-1] - 1]
    return F.silu(y_be) if activation else y_be


def last_inputs(x_ble: Tensor, k: int, seq_idx: Tensor | None = None) -> Tensor:
    """The last k inputs of each row, (b, e, k), zeros before the first.

    Args:
        x_ble: (b, l, e).
        k: how many.
        seq_idx: (b, l); only inputs of the row's last sequence count.

    Example:
        >>> last_inputs(torch.tensor([[[1.0], [2.0]]]), 3).tolist()
        [[[0.0, 1.0, 2.0]]]
    """
    x_ble = x_ble.detach()
    if seq_idx is not None:
        x_ble = x_ble * (seq_idx == seq_idx[:, -1:]).unsqueeze(-1)
    return F.pad(x_ble.transpose(1, 2), (k - x_ble.shape[1], 0))


class CachedStates:
    """What a recurrent layer has, to keep its states in an inference cache.

    Attributes:
        layer_idx: the layer's key in the cache.
        allocate_inference_cache: makes new states for a batch, all zero.
    """

    layer_idx: int | None
    allocate_inference_cache: Callable[..., States]

    def _get_states_from_cache(
        self, inference_params: InferenceParams, batch_size: int, initialize_states: bool = False
    ) -> States:
        """The layer's states in a cache, which makes room for them at the first call.

        Args:
            inference_params: the cache of one generation.
            batch_size: the number of rows, or of packed sequences.
            initialize_states: whether states that are there already are set to zero.

        Returns:
            The states of the convolution and of the recurrence, to be changed in place.

        Raises:
            InputError: the layer has no index, or the cache is for another number of rows.
        """
        layer, cached = self.layer_idx, inference_params.key_value_memory_dict
        if layer is None:
            raise InputError(
                "a layer used with inference_params needs a layer_idx; pass layer_idx=0"
            )
        if layer not in cached:
            cached[layer] = self.allocate_inference_cache(batch_size, inference_params.max_seqlen)
        states: States = cached[layer]
        if states[0].shape[0] != batch_size:
            raise InputError(
                f"the cache of layer {layer} holds {states[0].shape[0]} rows, the input has "
                f"{batch_size}; use new InferenceParams for another batch"
            )
        if initialize_states:
            for state in states:
                state.zero_()
        return states
