"""`from_pretrained` for every layout: Transformers', the original's and minimal's, and GGUF.

Where a folder's tensors have Transformers' names, its own `from_pretrained` reads them. From all
other files the tensors are read here, and it gets them under the names it knows. Either way what
a Mamba needs must be there: only a head or a buffer of a user's own class starts anew, with
Transformers' warning.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from torch import Tensor
from transformers import PreTrainedConfig

from anymamba import checkpoint as files
from anymamba.checkpoint.architecture import EMBEDDINGS, HEAD
from anymamba.checkpoint.shapes import check_repeated_head
from anymamba.checkpoint.torch_weights import check_floating_point, load_named_tensors
from anymamba.errors import CheckpointError, InputError
from anymamba.modeling.gguf import gguf_state_dict
from anymamba.modeling.loading.arguments import (
    PASSED_ON,
    check_architecture,
    make_config,
    own_config,
    refuse_arguments,
    set_generation_config,
)
from anymamba.modeling.loading.find import Found, find_model, load_adapter
from anymamba.modeling.loading.quantized import is_ours, load_quantized
from anymamba.modeling.loading.tensor_names import (
    is_of_mamba,
    own_names,
    rename_state_dict,
    ties_head,
)


class FromAnyLayout:
    """Mixed in before `PreTrainedModel`: finds out what a checkpoint is, checks it, loads it."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        check_architecture(type(self), config.model_type)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        self.register_load_state_dict_pre_hook(rename_state_dict)  # type: ignore[attr-defined]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,
        **kwargs: Any,
    ) -> Self:
        """Load a model from a folder, a GGUF file or the hub, whatever layout it is in.

        Args:
            pretrained_model_name_or_path: a local folder, a GGUF file or a hub id. Three layouts
                of a folder are told apart by their `config.json`: Transformers', the original's
                (`d_model`, `ssm_cfg`, ...) and `anymamba.minimal`'s. A folder with an adapter of
                PEFT's gives its base model with the adapter. None takes `config` and `state_dict`
                from the arguments, as Transformers does.
            *model_args: passed on to the model's constructor.
            **kwargs: what Transformers' `from_pretrained` takes: `dtype`, `device_map`,
                `quantization_config`, `gguf_file`, `variant`, `revision`, ...;
                docs/transformers.md has a table of all.

        Returns:
            The model, in evaluation mode; with `output_loading_info=True`, (model, information).

        Raises:
            HubError: the model is neither here nor to be had from the hub.
            CheckpointError: files are missing or broken, or tensors are missing, unexpected or
                misshapen; one message names them all.
            InputError: an argument has no meaning for this model.
            MissingDependencyError: a GGUF file or an adapter needs a package that is missing.
        """
        load = _Loading(cls, super().from_pretrained, model_args, dict(kwargs))  # type: ignore[misc]
        refuse_arguments(kwargs)
        wants_info = load.keywords.pop("output_loading_info", False)
        if pretrained_model_name_or_path is None:
            model, info = load.from_arguments()
        elif load.keywords.pop("state_dict", None) is not None:
            raise InputError("state_dict: give it with config, and None in the place of a model")
        else:
            # `load_causal_lm` has looked already, to choose the class.
            found = load.keywords.pop("_found", None)
            found = found or find_model(pretrained_model_name_or_path, load.keywords)
            model, info = load.from_gguf(found) if found.is_gguf else load.from_folder(found)
            _name(model, pretrained_model_name_or_path if found.name is None else found.name)
            info = load_adapter(model, found) or info
        return (model, info) if wants_info else model  # type: ignore[return-value]

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        """What the Auto classes' `from_config` calls; Transformers' config becomes ours."""
        return super()._from_config(own_config(config), **kwargs)  # type: ignore[misc]


_Loaded = tuple[Any, Mapping[str, Any]]


@dataclass
class _Loading:
    """One call of `from_pretrained`.

    Args:
        cls: the model's class.
        load: Transformers' `from_pretrained` of that class.
        arguments: for the model's constructor.
        keywords: the keyword arguments that are not dealt with yet.
    """

    cls: Any
    load: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    @property
    def is_own(self) -> bool:
        """Whether the class is AnyMamba's, whose tensors are known before there is a model."""
        return bool(self.cls.__module__.startswith("anymamba."))

    def from_arguments(self) -> _Loaded:
        """A model of `config` and `state_dict`."""
        weights = self.keywords.pop("state_dict", None)
        if weights is None or self.keywords.get("config") is None:
            raise InputError(
                "None in the place of a model needs config= and state_dict=; give both, or the "
                "name of a model"
            )
        config = make_config(self.cls, {}, self.keywords)
        names = files.canonical_names(weights, "state_dict", self.keywords.pop("key_mapping", None))
        return self._of_tensors(
            config, {new: weights[old] for new, old in names.items()}, "the state_dict"
        )

    def from_gguf(self, found: Found) -> _Loaded:
        """A model of a GGUF file."""
        for name in ("variant", "use_safetensors", "key_mapping"):
            self.keywords.pop(name, None)  # about names that this file does not have
        config = make_config(self.cls, found.config, self.keywords)
        return self._of_tensors(config, gguf_state_dict(found.path), repr(str(found.path)))

    def from_folder(self, found: Found) -> _Loaded:
        """A model of a folder."""
        which = {name: self.keywords.pop(name, None) for name in ("variant", "use_safetensors")}
        stored = files.open_checkpoint(
            found.path, **which, key_mapping=self.keywords.pop("key_mapping", None)
        )
        if self.keywords.pop("weights_only", True) is False and stored.pickled:
            raise InputError(
                "weights_only=False would let the file run code, which AnyMamba never does; leave "
                "it out"
            )
        if "quantization_config" in stored.config:
            if is_ours(stored.config["quantization_config"]):
                return load_quantized(self.cls, stored, self.arguments, self.keywords)
            # Its tensors have other names and types; the quantizer knows them.
            return self._call(found.path, **which)
        config = make_config(self.cls, stored.config, self.keywords)
        if self._is_read_by_transformers(stored, config) and found.adapter is None:
            self._check_located(stored, config)
            model, info = self._call(found.path, config=config, **which)
            _refuse_missing(model, info, found.path)
            return model, info
        model, info = self._of_tensors(config, load_named_tensors(stored), repr(str(found.path)))
        if self.keywords.get("generation_config") is None:
            set_generation_config(model, found.path)
        return model, info

    def _is_read_by_transformers(self, stored: files.Checkpoint, config: Any) -> bool:
        """Whether Transformers knows the file's names: its own, with or without the prefix."""
        if stored.pickled or stored.layout != "transformers" or stored.key_mapping:
            return False
        own = {} if self.is_own else self._own_names(config)
        for new, record in stored.tensors.items():
            plain = (new, new.removeprefix("backbone."))
            target = own.get(new, new)
            if record.name != target and not (record.name in plain and target in plain):
                return False
        return True

    def _check_located(self, stored: files.Checkpoint, config: Any) -> None:
        """Check the tensors of safetensors files before any is read."""
        where = repr(str(stored.folder))
        shapes = {name: record.shape for name, record in stored.tensors.items()}
        self._check_shapes(shapes, config, where)
        for name, record in stored.tensors.items():
            if is_of_mamba(name) and not record.dtype.startswith(("F", "BF")):
                raise CheckpointError(
                    f"{name} in {where} is stored as {record.dtype}, expected floating-point "
                    "numbers"
                )
        if self._repeats_head(shapes, config):
            both = {name: stored.tensors[name] for name in (HEAD, EMBEDDINGS)}
            check_repeated_head(load_named_tensors(replace(stored, tensors=both)), where)

    def _check_shapes(self, shapes: Mapping[str, Any], config: Any, where: object) -> None:
        """Compare the tensors that are there with those of our own classes.

        Of a user's class they are known only when it is there; and a head of another task is
        none of ours, and for Transformers to report.
        """
        if not self.is_own:
            return
        expected = files.expected_shapes(config.to_dict())
        if not ties_head(self.cls):
            expected.pop(HEAD, None)
        found = dict(shapes)
        if expected.keys() <= found.keys():
            found = {name: shape for name, shape in found.items() if is_of_mamba(name)}
        if self.keywords.get("ignore_mismatched_sizes"):
            found = {name: expected.get(name, shape) for name, shape in found.items()}
        files.check_tensors(found, expected, where)

    def _repeats_head(self, stored: Mapping[str, Any], config: Any) -> bool:
        """Whether a tied model's files hold the head as well as the embedding table."""
        tied = ties_head(self.cls) and config.tie_word_embeddings
        return bool(tied and {HEAD, EMBEDDINGS} <= stored.keys())

    def _of_tensors(self, config: Any, weights: dict[str, Tensor], where: str) -> _Loaded:
        """A model of tensors by Transformers' names."""
        self._check_shapes({name: tuple(t.shape) for name, t in weights.items()}, config, where)
        check_floating_point({n: t for n, t in weights.items() if is_of_mamba(n)}, where)
        if self._repeats_head(weights, config):
            check_repeated_head(weights, where)
        if not self.is_own:
            own = self._own_names(config)
            weights = {own.get(name, name): tensor for name, tensor in weights.items()}
        model, info = self._call(None, config=config, state_dict=weights)
        _refuse_missing(model, info, where)
        return model, info

    def _own_names(self, config: Any) -> dict[str, str]:
        known = {*PASSED_ON, "generation_config", "ignore_mismatched_sizes", "weights_only"}
        constructor = {name: v for name, v in self.keywords.items() if name not in known}
        names: dict[str, str] = own_names(self.cls, config, self.arguments, constructor)
        return names

    def _call(self, place: Path | None, **keywords: Any) -> _Loaded:
        model, info = self.load(
            place, *self.arguments, output_loading_info=True, **keywords, **self.keywords
        )
        return model, info


def _refuse_missing(model: Any, info: Mapping[str, Any], where: object) -> None:
    """Refuse what Transformers filled with initial values, unless it is no part of a Mamba.

    Raises:
        CheckpointError: the message names the tensors.
    """
    from anymamba.modeling.mamba import MambaModel

    missing = set(info["missing_keys"])
    needed = [HEAD] if ties_head(type(model)) else []
    for path, module in model.named_modules():
        if isinstance(module, MambaModel):
            prefix = f"{path}." if path else ""
            names = files.expected_shapes(module.config.to_dict())
            needed += [prefix + name.removeprefix("backbone.") for name in names if name != HEAD]
    if missing & set(needed):
        expected = dict.fromkeys(needed, ())
        found = {name: () for name in needed if name not in missing}
        files.check_tensors(found, expected, where)


def _name(model: Any, name: str | os.PathLike[str]) -> None:
    """Let a model say where it comes from in the caller's words, which adapters write down."""
    model.name_or_path = model.config.name_or_path = str(name)
