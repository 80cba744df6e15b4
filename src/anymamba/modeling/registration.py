"""AnyMamba's classes behind Transformers' Auto classes, for as long as the user wants them there.

Importing AnyMamba changes nothing elsewhere. `register` does, and `unregister` undoes it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from transformers import AutoModel, AutoModelForCausalLM, AutoModelForPreTraining
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from anymamba.modeling.adapters import patch_peft
from anymamba.modeling.causal_lm import MambaForCausalLM
from anymamba.modeling.config import MambaConfig
from anymamba.modeling.model import MambaModel

__all__ = ["register", "unregister"]

_BUILT_BY = {
    AutoModel: MambaModel,
    AutoModelForCausalLM: MambaForCausalLM,
    AutoModelForPreTraining: MambaForCausalLM,
}

# What undoes the registration; it is empty while there is none.
_undo: list[ExitStack] = []


def register() -> None:
    """Let Transformers and PEFT treat model_type "mamba" as AnyMamba's.

    From then on `AutoConfig`, `AutoModel`, `AutoModelForCausalLM` and
    `pipeline("text-generation")` build AnyMamba's classes, with the tokenizers they would use
    anyway; and PEFT, if it is installed, adapts every projection of AnyMamba's models and unties
    the head before it merges an adapter of tied embeddings. Calling it again changes nothing.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> register()
        >>> config = MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1)
        >>> type(AutoModelForCausalLM.from_config(config)).__module__
        'anymamba.modeling.causal_lm'
        >>> unregister()
    """
    if _undo:
        return
    with ExitStack() as undo:
        undo.callback(_put(CONFIG_MAPPING, MambaConfig.model_type, MambaConfig))
        for auto, model in _BUILT_BY.items():
            undo.callback(_put(auto._model_mapping, MambaConfig, model))
        undo.callback(patch_peft())
        _undo.append(undo.pop_all())


def unregister() -> None:
    """Undo `register`: Transformers and PEFT are as they were before. Without it, do nothing.

    Example:
        >>> unregister()
    """
    while _undo:
        _undo.pop().close()


def _put(mapping: Any, key: Any, value: Any) -> Callable[[], None]:
    """Register value in one of Transformers' mappings; return what undoes it."""
    # Transformers can register and not unregister; its own entries lie beneath this dictionary.
    registered = mapping._extra_content
    before = {key: registered[key]} if key in registered else {}
    mapping.register(key, value, exist_ok=True)

    def undo() -> None:
        # Whoever registered over ours in the meantime keeps what they put there.
        if registered.get(key) is value:
            del registered[key]
            registered.update(before)

    return undo
