"""The decode step of Transformers' Mamba mixers in one native call.

Transformers calls the packages' functions for the convolution and the state space of a step, and
PyTorch for all else, which takes most of the time. Here the whole mixer is one call of the core on
the model's own weights and the cache's own states. Whatever is unusual goes to Transformers' code.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from anymamba.checkpoint.architecture import MAMBA
from anymamba.layers.native import PROJECTIONS, Part, core_tensors, mixer_parts
from anymamba.ops import backend, matmul_dtype
from anymamba.ops.backends import BACKENDS, native_is_chosen
from anymamba.ops.fusable import fusable
from anymamba.ops.native import TYPES, core, handed
from anymamba.ops.tracing import runs_now
from anymamba.ops.watch import ModuleWatch

MOST_ROWS = 64
"""Batches above this decode faster as matrix products."""

# The norms of Falcon-Mamba and Jamba, and their names in the core.
_NORMS = {"dt_layernorm": "dt_norm", "b_layernorm": "B_norm", "c_layernorm": "C_norm"}
# The functions that a step of Transformers' calls.
_FUNCTIONS = ("causal_conv1d_update", "mamba_selective_state_update")
# What decides a module's result beside its weights.
_SETTINGS = (
    *("activation", "time_step_rank", "ssm_state_size", "eps", "variance_epsilon"),
    *("stride", "dilation", "groups", "padding_mode"),
)

_replaced: dict[type[nn.Module], tuple[Any, Any]] = {}
"""For each class, Transformers' forward and ours."""

_functions: dict[type[nn.Module], tuple[Any, ...]] = {}


def replace(module: ModuleType, kind: type[nn.Module]) -> None:
    """Replace the forward of the mixer's class in one of Transformers' modules by one that takes
    plain decode steps natively."""
    if kind in _replaced:
        take_again()
        return
    original = kind.forward
    for name in ("JambaRMSNorm", "FalconMambaWeightlessRMSNorm"):
        if hasattr(module, name):
            fusable(getattr(module, name))
    _functions[kind] = tuple(getattr(module, name) for name in _FUNCTIONS)

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or type(self) is not kind:
            return original(self, *args, **kwargs)
        stepped = step(self, *args, **kwargs)
        return original(self, *args, **kwargs) if stepped is None else stepped

    _replaced[kind] = original, forward
    kind.forward = forward


def take_again() -> None:
    """Replace the forward of all classes again that was given back."""
    for kind, (original, ours) in _replaced.items():
        if kind.forward is original:
            kind.forward = ours


def give_back() -> None:
    """Give the classes their own forward back, except where a program has replaced ours."""
    for kind, (original, ours) in _replaced.items():
        if kind.forward is ours:
            kind.forward = original


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
    if cache is None or attention_mask is not None or more or others:
        return None
    if hidden_states is None or torch.is_grad_enabled() or not _is_one_token(hidden_states):
        return None
    index = mixer.layer_idx
    window_bek = cache.get_conv_state(index, state_idx=0)
    state_ben = cache.get_recurrent_state(index, state_idx=0)
    if window_bek is None or state_ben is None or cache.is_recording_past(index):
        return None
    table = _table_of(mixer)
    if table is None or not table.fits(hidden_states, window_bek, state_ben):
        return None
    return table.step(hidden_states, window_bek, state_ben)


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
    kind = type(mixer)
    if kind not in _replaced:
        known = "a mixer that the drop-in knows, or was imported before install()"
        return f"{kind.__name__} is not {known}"
    if kind.forward is not _replaced[kind][1]:
        return f"the forward of {kind.__name__} is not the drop-in's: replaced, or switched off"
    if not native_is_chosen():
        return BACKENDS["cpu"].missing() or f"the backend {backend()!r} is chosen"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    module = sys.modules[kind.__module__]
    for name, function in zip(_FUNCTIONS, _functions[kind], strict=True):
        if getattr(module, name) is not function:
            return f"{module.__name__}.{name} was replaced"
    return _why_not_usual(mixer)


def _why_not_usual(mixer: Any) -> str | None:
    """Why the weights of a mixer do not say all that it computes, or the core cannot read them."""
    if mixer.activation not in ("silu", "swish"):
        return f"the activation is {mixer.activation}"
    for part in _parts(mixer):
        reason = part.why_not_usual()
        if reason is not None:
            return f"{part.name}: {reason}"
    e, n = mixer.A_log.shape
    if mixer.ssm_state_size != n or mixer.conv1d.weight.shape[:2] != (e, 1):
        return "its sizes are not those of its weights"
    if len({getattr(mixer, name).weight.dtype for name in PROJECTIONS}) > 1:
        return "its projections have several types"
    if _has_norms(mixer) and len({_eps(getattr(mixer, name)) for name in _NORMS}) > 1:
        return "its norms have several epsilons"
    for name, weight in mixer.named_parameters():
        if type(weight) is not nn.Parameter or weight.dtype not in TYPES:
            return f"{name} is a {type(weight).__name__} of {weight.dtype}"
        if weight.device.type != "cpu" or not weight.is_contiguous():
            return f"{name} is on {weight.device}, or not contiguous"
    return None


def _parts(mixer: Any) -> Iterator[Part]:
    """The modules of a mixer that a native step goes past."""
    yield from mixer_parts(mixer, (mixer.hidden_size, *mixer.A_log.shape, mixer.time_step_rank))
    if _has_norms(mixer):
        module = sys.modules[type(mixer).__module__]
        weightless = getattr(module, "FalconMambaWeightlessRMSNorm", None)
        for name in _NORMS:
            yield Part(name, getattr(mixer, name), weightless or module.JambaRMSNorm)


def _has_norms(mixer: nn.Module) -> bool:
    return hasattr(mixer, "dt_layernorm")


def _eps(norm: Any) -> float:
    return float(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)


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
        modules = [mixer, *(part.module for part in _parts(mixer))]
        self.watch = ModuleWatch(mixer, modules, _SETTINGS)
        kind = type(mixer)
        for name in _FUNCTIONS:
            self.watch.attribute(sys.modules[kind.__module__], name)
        self._dtype = mixer.in_proj.weight.dtype
        self._width = mixer.in_proj.weight.shape[1]
        self._window_shape_ek = (mixer.A_log.shape[0], mixer.conv1d.weight.shape[2])
        self._state_shape_en = tuple(mixer.A_log.shape)
        eps = _eps(mixer.dt_layernorm) if _has_norms(mixer) else 0.0
        self._mixer = core().Mixer(_layer(mixer), self._width, eps)

    def fits(self, hidden_b1d: Tensor, window_bek: Tensor, state_ben: Tensor) -> bool:
        """Whether the core can work on these tensors where they lie."""
        b = hidden_b1d.shape[0]
        return (
            hidden_b1d.dtype == self._dtype
            and hidden_b1d.shape[2] == self._width
            and window_bek.shape == (b, *self._window_shape_ek)
            and state_ben.shape == (b, *self._state_shape_en)
            and window_bek.dtype in TYPES
            and state_ben.dtype == torch.float32
            and all(
                type(states) is Tensor and states.is_cpu and states.is_contiguous()
                for states in (window_bek, state_ben)
            )
        )

    def step(self, hidden_b1d: Tensor, window_bek: Tensor, state_ben: Tensor) -> Tensor:
        """(b, 1, d) what the mixer returns; both states advance."""
        out_b1d = torch.empty_like(hidden_b1d)
        core()  # set to PyTorch's number of threads
        self._mixer.step(
            handed(hidden_b1d[:, 0]),
            handed(window_bek),
            handed(state_ben),
            handed(out_b1d[:, 0]),
            matmul_dtype() == "bfloat16",
        )
        return out_b1d


def _layer(mixer: Any) -> dict[str, Any]:
    """A mixer's tensors as the core names them, the model's own memory every one of them."""
    tensors = core_tensors(mixer, MAMBA)
    if _has_norms(mixer):
        widths = (mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size)
        for (name, name_in_core), width in zip(_NORMS.items(), widths, strict=True):
            # Falcon-Mamba's norms have a buffer of this name, which they do not use.
            weight = getattr(mixer, name)._parameters.get("weight")
            plain = torch.ones(width, dtype=torch.float32, device="cpu")
            tensors[name_in_core] = plain if weight is None else weight.detach()
    return tensors


_TABLES: WeakKeyDictionary[nn.Module, Table] = WeakKeyDictionary()
