"""What the layers share: checks of their sizes, and the states that they keep in a cache."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anymamba.errors import ConfigError, InputError
from anymamba.layers import States
from anymamba.ops.fusable import why_not_fusable
from anymamba.renamed import old_names

if TYPE_CHECKING:
    from anymamba.dropin.mamba_ssm.utils.generation import InferenceParams

__getattr__ = old_names(__name__)


def check_sizes(**sizes: object) -> None:
    """Refuse sizes, by the names of a layer's arguments, that are not whole numbers from 1 up.

    Example:
        >>> check_sizes(d_state=0)
        Traceback (most recent call last):
            ...
        anymamba.errors.ConfigError: d_state must be a whole number of at least 1, got 0
    """
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, Integral) or size < 1:
            raise ConfigError(f"{name} must be a whole number of at least 1, got {size!r}")


def inner_width(d_model: int, expand: object) -> int:
    """The inner width of a layer, e = int(expand * d_model), which must not be 0.

    Example:
        >>> inner_width(10, 1.5)
        15
    """
    check_sizes(d_model=d_model)
    if isinstance(expand, bool) or not isinstance(expand, Real) or not math.isfinite(expand):
        raise ConfigError(f"expand must be a number, got {expand!r}")
    width = int(float(expand) * d_model)
    if width < 1:
        raise ConfigError(f"expand must be at least 1 / d_model, got {expand!r}")
    return width


def depthwise(
    width: int, d_conv: int, bias: bool, init: float | None, factory: dict[str, Any]
) -> nn.Conv1d:
    """A causal convolution of each channel with its own kernel."""
    conv1d = nn.Conv1d(width, width, d_conv, groups=width, padding=d_conv - 1, bias=bias, **factory)
    if init is not None:
        nn.init.uniform_(conv1d.weight, -init, init)
    return conv1d


def not_decayed(tensor: Tensor) -> nn.Parameter:
    """A parameter that asks optimizers for no weight decay."""
    parameter = nn.Parameter(tensor)
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return parameter


def all_plain(*modules: nn.Module) -> bool:
    """Whether the weights of these linear layers and convolutions say all that they do."""
    kinds = (nn.Conv1d if isinstance(module, nn.Conv1d) else nn.Linear for module in modules)
    return all(why_not_fusable(m, kind) is None for m, kind in zip(modules, kinds, strict=True))


def one_token(hidden_states: Tensor) -> Tensor:
    """(b, 1, d) as (b, d); a step takes one token."""
    if hidden_states.ndim != 3 or hidden_states.shape[1] != 1:
        raise InputError(
            f"a step takes hidden_states of shape (b, 1, d), got {tuple(hidden_states.shape)}; "
            "give the prompt in one call with seqlen_offset 0, then one token a call"
        )
    return hidden_states.squeeze(1)


class CachedStates:
    """What a recurrent layer has, to keep its states in an inference cache.

    Attributes:
        layer_idx: the layer's key in the cache.
    """

    layer_idx: int | None
    conv1d: nn.Conv1d
    d_conv: int
    d_inner: int
    d_state: int

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> States:
        """States for `step`, all zero.

        Args:
            batch_size: the number of rows.
            max_seqlen: does not matter: the states have one size for any length.
            dtype: of both states; by default the weights' for the convolution's, and float32 for
                the recurrence's, which sums over the whole past.
            kwargs: not used.

        Returns:
            The states that `step` takes.
        """
        weight = self.conv1d.weight
        window = self._empty_window(weight, batch_size, dtype)
        state_dtype = dtype or torch.promote_types(weight.dtype, torch.float32)
        return window, weight.new_zeros(batch_size, *self._state_sizes, dtype=state_dtype)

    @property
    def _state_sizes(self) -> tuple[int, ...]:
        """A row's state; layers with heads have another."""
        return self.d_inner, self.d_state

    def _empty_window(self, weight: Tensor, b: int, dtype: torch.dtype | None) -> Tensor:
        return weight.new_zeros(b, weight.shape[0], self.d_conv, dtype=dtype)

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
