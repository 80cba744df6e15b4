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
from anymamba.modeling.auto import CLASSES
from anymamba.modeling.config import read_config_dict

_BUILT_BY = {
    AutoModel: "model",
    AutoModelForCausalLM: "causal_lm",
    AutoModelForPreTraining: "causal_lm",
}


def _named_in() -> dict[str, dict[str, type]]:
    """Where other programs look up a class by its name, and which of ours they find there.

    TRL looks in `transformers`, and PEFT in the module of the model.
    """
    everywhere: dict[str, type] = {}
    places: dict[str, dict[str, type]] = {"transformers": everywhere}
    for name, classes in CLASSES.items():
        config, *models = classes
        package, configs = f"transformers.models.{name}", {config.__name__: config}
        by_name: dict[str, type] = {cls.__name__: cls for cls in models}
        everywhere |= by_name | configs
        places[package] = by_name | configs
        places[f"{package}.modeling_{name}"] = by_name
        places[f"{package}.configuration_{name}"] = dict(configs)
    return places


_NAMED_IN = _named_in()

# What undoes the registration; it is empty while there is none.
_undo: list[ExitStack] = []


def register() -> None:
    """Let Transformers and PEFT treat the model types of `auto.CLASSES` as AnyMamba's.

    From then on `AutoConfig`, `AutoModel`, `AutoModelForCausalLM` and
    `pipeline("text-generation")` build AnyMamba's classes, with the tokenizers they would use
    anyway, from folders in the original layout as well; programs that look up
    `transformers.MambaForCausalLM` by its name, such as TRL's trainers and `AutoPeftModel`, find
    AnyMamba's; and PEFT, if it is installed, adapts every projection of AnyMamba's models and
    unties the head before it merges an adapter of tied embeddings. Classes of Transformers' that
    were imported before work on. Calling it again changes nothing.

    Example:
        >>> from anymamba import MambaConfig
        >>> register()
        >>> config = MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1)
        >>> type(AutoModelForCausalLM.from_config(config)).__module__
        'anymamba.modeling.mamba.causal_lm'
        >>> unregister()
    """
    if _undo:
        return
    with ExitStack() as undo:
        for name, classes in CLASSES.items():
            undo.callback(_put(CONFIG_MAPPING, name, classes.config))
            for auto, role in _BUILT_BY.items():
                built = getattr(classes, role)
                undo.callback(_put(auto._model_mapping, classes.config, built))
        for place, shown in _NAMED_IN.items():
            undo.callback(_show_in(importlib.import_module(place), shown))
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
