"""The decode step of Transformers' Mamba mixers in one native call.

Transformers calls the packages' functions for the convolution and the state space of a step, and
PyTorch for all else, which takes most of the time. Here the whole mixer is one call of the core on
the model's own weights and the cache's own states. Whatever is unusual goes to Transformers' code.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from anymamba.dropin.mixer_kinds import MixerKind, kind_of
from anymamba.ops import backend, matmul_dtype
from anymamba.ops.backends import BACKENDS, native_is_chosen
from anymamba.ops.fusable import fusable
from anymamba.ops.native import TYPES, core, handed
from anymamba.ops.tracing import PLAIN_TYPES, runs_now
from anymamba.ops.watch import ModuleWatch

MOST_ROWS = 64
"""Batches above this decode faster as matrix products."""

# What hybrids hand to all their layers, and no function of a mixer takes.
_FOR_OTHERS = {
    *("position_ids", "position_embeddings"),
    *("output_attentions", "output_hidden_states", "output_router_logits"),
}


@dataclass(frozen=True)
class _Replaced:
    """A class of mixers whose forward was replaced."""

    kind: MixerKind
    original: Any
    """Transformers' forward."""
    ours: Any
    functions: tuple[Any, ...]
    """What the functions of its kind were when it was imported."""


_replaced: dict[type[nn.Module], _Replaced] = {}


def replace(module: ModuleType, mixer_class: type[nn.Module]) -> None:
    """Replace the forward of the mixer's class in one of Transformers' modules by one that takes
    plain decode steps natively."""
    if mixer_class in _replaced:
        take_again()
        return
    kind, original = kind_of(module), mixer_class.forward
    norm_class = kind.norm_class(module)
    if norm_class is not None:
        fusable(norm_class)

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or type(self) is not mixer_class:
            return original(self, *args, **kwargs)
        stepped = step(self, *args, **kwargs)
        return original(self, *args, **kwargs) if stepped is None else stepped

    functions = tuple(getattr(module, name) for name in kind.functions)
    _replaced[mixer_class] = _Replaced(kind, original, forward, functions)
    mixer_class.forward = forward


def take_again() -> None:
    """Replace the forward of all classes again that was given back."""
    for mixer_class, replaced in _replaced.items():
        if mixer_class.forward is replaced.original:
            mixer_class.forward = replaced.ours


def give_back() -> None:
    """Give the classes their own forward back, except where a program has replaced ours."""
    for mixer_class, replaced in _replaced.items():
        if mixer_class.forward is replaced.ours:
            mixer_class.forward = replaced.original


def step(
    mixer: nn.Module,
    hidden_states: Tensor | None = None,
    cache: Any = None,
    attention_mask: Tensor | None = None,
    *more: Any,
    **others: Any,
) -> Tensor | None:
    """One token of each row through a mixer, if it is a plain decode step.

    Returns:
        (b, 1, d), with both states advanced; or None where nothing was done.
    """
    if cache is None or attention_mask is not None or more or not others.keys() <= _FOR_OTHERS:
        return None
    if hidden_states is None or torch.is_grad_enabled() or not _is_one_token(hidden_states):
        return None
    index = mixer.layer_idx
    window = cache.get_conv_state(index, state_idx=0)
    state = cache.get_recurrent_state(index, state_idx=0)
    if window is None or state is None or cache.is_recording_past(index):
        return None
    table = _table_of(mixer)
    if table is None or not table.fits(hidden_states, window, state):
        return None
    return table.step(hidden_states, window, state)


def _is_one_token(hidden_states: Any) -> bool:
    return (
        isinstance(hidden_states, Tensor)
        and runs_now(hidden_states)
        and hidden_states.is_cpu
        and hidden_states.ndim == 3
        and hidden_states.shape[1] == 1
        and 0 < hidden_states.shape[0] <= MOST_ROWS
        and hidden_states.is_contiguous()
    )


def why_not_fused(mixer: nn.Module) -> str | None:
    """The reason why Transformers' own code takes a mixer's decode steps, or None.

    Example:
        >>> from torch import nn
        >>> why_not_fused(nn.Linear(2, 2))
        'Linear is not a mixer that the drop-in knows, or was imported before install()'
    """
    mixer_class = type(mixer)
    name = mixer_class.__name__
    if mixer_class not in _replaced:
        return f"{name} is not a mixer that the drop-in knows, or was imported before install()"
    replaced = _replaced[mixer_class]
    if mixer_class.forward is not replaced.ours:
        return f"the forward of {name} is not the drop-in's: replaced, or switched off"
    if not native_is_chosen():
        return BACKENDS["cpu"].missing() or f"the backend {backend()!r} is chosen"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    module = sys.modules[mixer_class.__module__]
    for function, known in zip(replaced.kind.functions, replaced.functions, strict=True):
        if getattr(module, function) is not known:
            return f"{module.__name__}.{function} was replaced"
    return _why_not_usual(mixer, replaced.kind)


def _why_not_usual(mixer: Any, kind: MixerKind) -> str | None:
    """Why the weights of a mixer do not say all that it computes, or the core cannot read them."""
    if mixer.activation not in ("silu", "swish"):
        return f"the activation is {mixer.activation}"
    for part in kind.parts(mixer):
        reason = part.why_not_usual()
        if reason is not None:
            return f"{part.name}: {reason}"
    reason = kind.why_not_usual(mixer)
    if reason is not None:
        return reason
    if len({getattr(mixer, name).weight.dtype for name in kind.projections}) > 1:
        return "its projections have several types"
    for name, weight in (*mixer.named_parameters(), *mixer.named_buffers(recurse=False)):
        if type(weight) not in PLAIN_TYPES or weight.dtype not in TYPES:
            return f"{name} is a {type(weight).__name__} of {weight.dtype}"
        if weight.device.type != "cpu" or not weight.is_contiguous():
            return f"{name} is on {weight.device}, or not contiguous"
    return None


def _table_of(mixer: nn.Module) -> Table | None:
    """The mixer as the native core runs it, or None where its own code must."""
    table = _TABLES.get(mixer)
    if table is not None and table.watch.holds():
        return table
    _TABLES.pop(mixer, None)
    if why_not_fused(mixer) is not None:
        return None
    _TABLES[mixer] = table = Table(mixer)
    return table


class Table:
    """The pointers to a mixer's weights, and what must not have changed for them to be right."""

    def __init__(self, mixer: Any) -> None:
        kind = _replaced[type(mixer)].kind
        modules = [mixer, *(part.module for part in kind.parts(mixer))]
        self.watch = ModuleWatch(mixer, modules, kind.settings)
        for name in kind.functions:
            self.watch.attribute(sys.modules[type(mixer).__module__], name)
        self._dtype = mixer.in_proj.weight.dtype
        self._width = mixer.in_proj.weight.shape[1]
        self._window_shape = (mixer.conv1d.weight.shape[0], mixer.conv1d.weight.shape[2])
        self._state_shape = kind.state_shape(mixer)
        self._input_scale = kind.input_scale(mixer)
        self._mixer = core().Mixer(kind.layer(mixer), self._width, **kind.core_options(mixer))

    def fits(self, hidden_b1d: Tensor, window: Tensor, state: Tensor) -> bool:
        """Whether the core can work on these tensors where they lie."""
        b = hidden_b1d.shape[0]
        return (
            hidden_b1d.dtype == self._dtype
            and hidden_b1d.shape[2] == self._width
            and window.shape == (b, *self._window_shape)
            and state.shape == (b, *self._state_shape)
            and window.dtype in TYPES
            and state.dtype == torch.float32
            and all(
                type(states) is Tensor and states.is_cpu and states.is_contiguous()
                for states in (window, state)
            )
        )

    def step(self, hidden_b1d: Tensor, window: Tensor, state: Tensor) -> Tensor:
        """(b, 1, d) what the mixer returns; both states advance."""
        if self._input_scale != 1.0:
            hidden_b1d = hidden_b1d * self._input_scale
        out_b1d = torch.empty_like(hidden_b1d)
        core()  # set to PyTorch's number of threads
        self._mixer.step(
            handed(hidden_b1d[:, 0]),
            handed(window),
            handed(state),
            handed(out_b1d[:, 0]),
            matmul_dtype() == "bfloat16",
        )
        return out_b1d


_TABLES: WeakKeyDictionary[nn.Module, Table] = WeakKeyDictionary()
