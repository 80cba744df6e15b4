"""May a step of `generate` pass by a call of the model itself?

Only while such a call would run what the class defined: no method is replaced, and the model has no
hooks and is not compiled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from transformers import GenerationMixin

from anymamba.ops.fusable import HOOKS

if TYPE_CHECKING:
    from anymamba.modeling.mamba import MambaForCausalLM

_Model = TypeVar("_Model", bound=type[GenerationMixin])

# What Transformers' loop calls and this one does not, or not at each step.
_METHODS = (
    "__call__",
    "_call_impl",
    "forward",
    "prepare_inputs_for_generation",
    "_prefill",
    "_has_unfinished_sequences",
    "_optimize_model_for_decode",
    "_update_model_kwargs_for_generation",
)
_originals: dict[str, Any] = {}
_TRANSFORMERS_LOOP = GenerationMixin._sample


def records_methods(kind: _Model) -> _Model:
    """Note a class's methods that Transformers' loop would call, to notice replaced ones."""
    _originals.update({name: getattr(kind, name) for name in _METHODS})
    return kind


def why_not_direct(model: MambaForCausalLM) -> str | None:
    """Why a step has to be a call of the model itself, whatever its parts are."""
    if GenerationMixin._sample is not _TRANSFORMERS_LOOP:
        return "_sample was replaced"
    own, kind = model.__dict__, type(model)
    for name, original in _originals.items():
        if name in own or getattr(kind, name) is not original:
            return f"{name} was replaced"
    if own.get("_compiled_call_impl") is not None:
        return "the model is compiled"
    if any(own[hooks] for hooks in HOOKS):
        return "the model has hooks"
    return None
