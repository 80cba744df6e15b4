"""AnyMamba's classes behind Transformers' Auto classes, for as long as the user wants them there.

Importing AnyMamba changes nothing elsewhere. `register` does, and `unregister` undoes it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import ModuleType
from typing import Any

from transformers import AutoModel, AutoModelForCausalLM, AutoModelForPreTraining, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from anymamba.modeling.adapters import patch_peft
from anymamba.modeling.config import MambaConfig, read_config_dict
from anymamba.modeling.mamba import MambaForCausalLM, MambaModel, MambaPreTrainedModel

_BUILT_BY = {
    AutoModel: MambaModel,
    AutoModelForCausalLM: MambaForCausalLM,
    AutoModelForPreTraining: MambaForCausalLM,
}
_MODELS: dict[str, type] = {
    cls.__name__: cls for cls in (MambaModel, MambaForCausalLM, MambaPreTrainedModel)
}
_CONFIGS: dict[str, type] = {MambaConfig.__name__: MambaConfig}
# Where other programs look up a class by its name: TRL in the first, PEFT in the third.
_NAMED_IN: Mapping[str, Mapping[str, type]] = {
    "transformers": _MODELS | _CONFIGS,
    "transformers.models.mamba": _MODELS | _CONFIGS,
    "transformers.models.mamba.modeling_mamba": _MODELS,
    "transformers.models.mamba.configuration_mamba": _CONFIGS,
}

# What undoes the registration; it is empty while there is none.
_undo: list[ExitStack] = []


def register() -> None:
    """Let Transformers and PEFT treat model_type "mamba" as AnyMamba's.

    From then on `AutoConfig`, `AutoModel`, `AutoModelForCausalLM` and
    `pipeline("text-generation")` build AnyMamba's classes, with the tokenizers they would use
    anyway, from folders in the original layout as well; programs that look up
    `transformers.MambaForCausalLM` by its name, such as TRL's trainers and `AutoPeftModel`, find
    AnyMamba's; and PEFT, if it is installed, adapts every projection of AnyMamba's models and
    unties the head before it merges an adapter of tied embeddings. Classes of Transformers' that
    were imported before work on. Calling it again changes nothing.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> register()
        >>> config = MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1)
        >>> type(AutoModelForCausalLM.from_config(config)).__module__
        'anymamba.modeling.mamba.causal_lm'
        >>> unregister()
    """
    if _undo:
        return
    with ExitStack() as undo:
        undo.callback(_put(CONFIG_MAPPING, MambaConfig.model_type, MambaConfig))
        for auto, model in _BUILT_BY.items():
            undo.callback(_put(auto._model_mapping, MambaConfig, model))
        for name, classes in _NAMED_IN.items():
            undo.callback(_show_in(importlib.import_module(name), classes))
        undo.callback(_read_all_layouts())
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


class _Shown:
    """A module's attribute as others see it; the module's own functions see what they saw before.

    A module looks up its own names in its dictionary, and everybody else asks its type first.
    """

    def __init__(self, name: str, value: type) -> None:
        self._name, self._value = name, value

    def __get__(self, module: ModuleType, owner: type) -> type:
        return self._value

    def __set__(self, module: ModuleType, value: type) -> None:
        # Whoever puts another class there gets it, also after `unregister`.
        self._value = module.__dict__[self._name] = value


def _show_in(module: ModuleType, classes: Mapping[str, type]) -> Callable[[], None]:
    """Let others find classes under names of a module; return what undoes it."""
    before = type(module)
    shown = {name: _Shown(name, value) for name, value in classes.items()}
    ours = type(before.__name__, (before,), shown)
    module.__class__ = ours

    def undo() -> None:
        if type(module) is ours:
            module.__class__ = before

    return undo


def _read_all_layouts() -> Callable[[], None]:
    """Let Transformers' configs read the original layout and GGUF files; return what undoes it."""
    before = PreTrainedConfig.__dict__["get_config_dict"]

    def get_config_dict(cls: Any, /, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        return read_config_dict(before.__get__(None, cls), pretrained_model_name_or_path, **kwargs)

    ours = classmethod(get_config_dict)
    PreTrainedConfig.get_config_dict = ours  # type: ignore[assignment, method-assign]

    def undo() -> None:
        if PreTrainedConfig.__dict__["get_config_dict"] is ours:
            PreTrainedConfig.get_config_dict = before  # type: ignore[method-assign]

    return undo
