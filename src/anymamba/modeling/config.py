"""What a Mamba model is: its sizes, its options, and the numbers it is initialized from.

`MambaConfig` has the fields of Transformers' Mamba, so that either library loads what the other
wrote. What it adds is that no value is taken unseen: each assignment is checked, at construction
as well as later, and a wrong one is refused with a line that names the field and the value.
"""

from __future__ import annotations

import math
import numbers
import os
import reprlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from anymamba.checkpoint.config import translate_config
from anymamba.checkpoint.io import user_path
from anymamba.errors import ConfigError
from anymamba.modeling.gguf import find_mamba_gguf, gguf_config

INIT_SCHEMES = ("random", "uniform", "constant")
"""How `dt_proj.weight` starts; "random" and "uniform" are two names of one scheme."""

# Transformers renamed its layer types once; files of either age are about the same layer.
_LAYER_TYPES = ("linear_attention", "mamba")

# Arguments that say where a config is read from. `gguf_file` is none: the Auto classes pass what is
# left to the model, which reads its weights from that file.
_PLACE = {
    *("cache_dir", "force_download", "proxies", "token", "local_files_only"),
    *("revision", "subfolder", "trust_remote_code", "_from_pipeline", "_from_auto"),
}


class MambaConfig(PreTrainedConfig):
    """The configuration of a Mamba model.

    It holds every size and option that building, initializing and running a model needs, and
    reads and writes Transformers' `config.json`. docs/configuration.md explains each field and
    names the initializer of each tensor.

    Args (all by keyword; letters as in the package's shape suffixes):
        vocab_size: v, rows of the embedding.
        hidden_size: d, the model width.
        state_size: n, the state each inner channel carries.
        num_hidden_layers: the number of residual blocks.
        layer_norm_epsilon: added to the mean square in each RMSNorm.
        pad_token_id, bos_token_id, eos_token_id: token ids or None; eos may be a list.
        expand: the inner width e is expand * hidden_size, which must be a whole number.
        conv_kernel: k, the width of the causal convolution.
        use_bias, use_conv_bias: biases of in_proj and out_proj, and of the convolution.
        hidden_act: activation after the convolution, by Transformers' names; the gate is silu.
        initializer_range: standard deviation of the embedding's initial values.
        residual_in_fp32: whether the residual stream is kept in float32.
        time_step_rank: r, the rank of the step size; 'auto' is ceil(hidden_size / 16).
        time_step_scale: scales the initial dt_proj.weight.
        time_step_min, time_step_max: range of the initial step sizes.
        time_step_init_scheme: 'random' or 'uniform' (one scheme), or 'constant'.
        time_step_floor: no initial step size is smaller.
        rescale_prenorm_residual: divide the initial out_proj.weight by sqrt(num_hidden_layers).
        use_cache: whether forward returns the state by default.
        use_mambapy: where no native kernel is there, scan with the `mambapy` package.
        use_associative_scan: accepted for Transformers' sake.
        tie_word_embeddings: whether the output head shares the embedding's weight.
        **kwargs: Transformers' common settings (`dtype`, ...); unknown ones are kept as they are.

    Raises:
        ConfigError: for a value that makes no sense, at construction and at each assignment.

    Example:
        >>> config = MambaConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2)
        >>> config.intermediate_size, config.time_step_rank
        (128, 4)
        >>> config.hidden_size = -1
        Traceback (most recent call last):
        anymamba.errors.ConfigError: MambaConfig: hidden_size must be an integer >= 1, got -1

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023;
    the field names are Transformers'.
    """

    model_type = "mamba"

    vocab_size: int = 50280
    hidden_size: int = 768
    state_size: int = 16
    num_hidden_layers: int = 32
    layer_norm_epsilon: float = 1e-5
    pad_token_id: int | None = 0
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    expand: int | float = 2
    conv_kernel: int = 4
    use_bias: bool = False
    use_conv_bias: bool = True
    hidden_act: str = "silu"
    initializer_range: float = 0.1
    residual_in_fp32: bool = True
    time_step_rank: int | str = "auto"
    time_step_scale: float = 1.0
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_init_scheme: str = "random"
    time_step_floor: float = 1e-4
    rescale_prenorm_residual: bool = False
    use_cache: bool = True
    use_mambapy: bool = False
    use_associative_scan: bool = True
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.time_step_rank == "auto":
            self.time_step_rank = math.ceil(self.hidden_size / 16)
        super().__post_init__(**kwargs)
        # Warns of token ids outside the vocabulary. They are no error: files on the hub have
        # them, and so has every model whose embedding was cut down.
        self.validate_token_ids()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _SETTINGS:
            value = _SETTINGS[name].check(name, value)
            _check_together({**self.__dict__, name: value}, changed=name)
        super().__setattr__(name, value)

    # Equality by what the configs say, kept unknown fields included. A dataclass would compare
    # its declared fields only, and among them the version of the library that wrote a file.
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MambaConfig):
            return NotImplemented
        mine, theirs = (config.to_dict() | {"_name_or_path": None} for config in (self, other))
        return bool(mine == theirs)

    @property
    def intermediate_size(self) -> int:
        """e, the inner width: expand * hidden_size. It follows both, so it cannot go stale."""
        return int(self.expand * self.hidden_size)

    @intermediate_size.setter
    def intermediate_size(self, value: int) -> None:
        if value != self.intermediate_size:
            raise ConfigError(
                f"MambaConfig: intermediate_size must be expand * hidden_size = "
                f"{self.intermediate_size}, got {_show(value)}; set expand or hidden_size instead"
            )

    @property
    def layer_types(self) -> list[str]:
        """The kind of each layer in Transformers' words, which its caches are built from."""
        return ["linear_attention"] * self.num_hidden_layers

    @layer_types.setter
    def layer_types(self, value: list[str]) -> None:
        known = isinstance(value, list | tuple) and all(kind in _LAYER_TYPES for kind in value)
        if not known or len(value) != self.num_hidden_layers:
            raise ConfigError(
                f"MambaConfig: layer_types must be 'linear_attention' for each of the "
                f"{self.num_hidden_layers} layers, got {_show(value)}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as a dictionary that `from_dict` and `json.dumps` take.

        Returns:
            A new dictionary; the derived `intermediate_size` is in it, as other programs read it.

        Example:
            >>> MambaConfig(hidden_size=64).to_dict()["intermediate_size"]
            128
        """
        output: dict[str, Any] = super().to_dict()
        output["intermediate_size"] = self.intermediate_size
        return output

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the settings in a model's folder, whichever layout it has, or in a GGUF file.

        Args:
            pretrained_model_name_or_path: a folder, a config file, a GGUF file, or a hub id.
            **kwargs: what Transformers' own takes, `gguf_file` included.

        Returns:
            The settings in Transformers' names, and the arguments that are left.

        Raises:
            CheckpointError: a GGUF file is broken.

        Example:
            >>> from anymamba.assets import bundled_model
            >>> MambaConfig.get_config_dict(bundled_model())[0]["num_hidden_layers"]
            7
        """
        return read_config_dict(super().get_config_dict, pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a config from a dictionary, with keyword arguments taking precedence.

        Args:
            config_dict: settings, as `to_dict` or a `config.json` has them; it is not changed.
            **kwargs: settings that override it; `return_unused_kwargs=True` also returns those
                that are no setting.

        Returns:
            The config, or (config, unused) if unused arguments were asked for.

        Raises:
            ConfigError: for a value that makes no sense.

        Example:
            >>> MambaConfig.from_dict({"hidden_size": 64, "expand": 2}, expand=4).intermediate_size
            256
        """
        fields = cls.__dataclass_fields__
        overrides = {name: value for name, value in kwargs.items() if name in fields}
        unused = {name: value for name, value in kwargs.items() if name not in fields}
        settings = {**config_dict, **overrides}
        # What follows from a setting was written for the old value of it.
        if {"hidden_size", "expand"} & overrides.keys():
            settings.pop("intermediate_size", None)
        if "num_hidden_layers" in overrides:
            settings.pop("layer_types", None)
        return super().from_dict(settings, **unused)


def read_config_dict(
    read: Callable[..., tuple[dict[str, Any], dict[str, Any]]],
    name: str | os.PathLike[str],
    /,
    **kwargs: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a model's settings; what another layout or a GGUF file says, in Transformers' names.

    Args:
        read: Transformers' own `get_config_dict`, for all that is no GGUF file of a Mamba.
        name: as `MambaConfig.get_config_dict` takes it.
        **kwargs: as `MambaConfig.get_config_dict` takes them.

    Returns:
        The settings, and the arguments that are left.

    Example:
        >>> fields = {"d_model": 8, "n_layer": 1, "vocab_size": 9}
        >>> settings, left = read_config_dict(lambda name: (fields, {}), "model")
        >>> settings["hidden_size"]
        8
    """
    inside = kwargs.get("gguf_file")
    path = find_mamba_gguf(user_path(name) / inside if inside else user_path(name))
    if path is not None:
        left = {key: value for key, value in kwargs.items() if key not in _PLACE}
        return gguf_config(path), left
    fields, left = read(name, **kwargs)
    if "model_type" not in fields and {"d_model", "n_layer"} <= fields.keys():
        return translate_config(fields)[1] | {"architectures": ["MambaForCausalLM"]}, left
    return fields, left


def _show(value: object) -> str:
    """The value in one short line, whatever it is."""
    return " ".join(reprlib.repr(value).split())


class _Setting(NamedTuple):
    """What a field of the config takes: in words, as a test, and how a value is stored."""

    expected: str
    accepts: Callable[[Any], bool]
    store: Callable[[Any], Any] = lambda value: value

    def check(self, name: str, value: Any) -> Any:
        """The value as it is stored, if the field takes it."""
        if not self.accepts(value):
            raise ConfigError(f"MambaConfig: {name} must be {self.expected}, got {_show(value)}")
        return self.store(value)


def _is_integer(value: Any, low: int) -> bool:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return whole and bool(value >= low)


def _is_real(value: Any) -> bool:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and math.isfinite(value)


def _are_token_ids(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(_is_integer(item, 0) for item in value)
    return value is None or _is_integer(value, 0)


def _is_dtype(value: Any) -> bool:
    named = getattr(torch, value, None) if isinstance(value, str) else value
    return value is None or isinstance(named, torch.dtype)


# NumPy's numbers become Python's, and whole numbers for real-valued fields become floats:
# json.dumps and Transformers refuse them otherwise.


def _plain_integers(value: Any) -> Any:
    """Integers, alone or in a list; None and words stay."""
    if isinstance(value, list | tuple):
        return [int(item) for item in value]
    return value if value is None or isinstance(value, str) else int(value)


def _whole_if_possible(value: Any) -> int | float:
    factor = float(value)
    return int(factor) if factor == int(factor) else factor


def _one_of(known: Collection[str]) -> _Setting:
    expected = f"one of {', '.join(sorted(known))}"
    return _Setting(expected, lambda value: isinstance(value, str) and value in known)


_INTEGER = _Setting("an integer >= 1", lambda value: _is_integer(value, 1), int)
_POSITIVE = _Setting("a finite number > 0", lambda value: _is_real(value) and value > 0, float)
_NOT_NEGATIVE = _Setting(
    "a finite number >= 0", lambda value: _is_real(value) and value >= 0, float
)
_BOOLEAN = _Setting("True or False", lambda value: isinstance(value, bool))
_MAYBE_BOOLEAN = _Setting("True or False", lambda value: value is None or isinstance(value, bool))
_TOKEN_ID = _Setting(
    "an integer >= 0 or None", lambda value: value is None or _is_integer(value, 0), _plain_integers
)
_SETTINGS: Mapping[str, _Setting] = {
    "vocab_size": _INTEGER,
    "hidden_size": _INTEGER,
    "state_size": _INTEGER,
    "num_hidden_layers": _INTEGER,
    "layer_norm_epsilon": _NOT_NEGATIVE,
    "pad_token_id": _TOKEN_ID,
    "bos_token_id": _TOKEN_ID,
    "eos_token_id": _Setting(
        "an integer >= 0, a list of them, or None", _are_token_ids, _plain_integers
    ),
    "expand": _POSITIVE._replace(store=_whole_if_possible),
    "conv_kernel": _INTEGER,
    "use_bias": _BOOLEAN,
    "use_conv_bias": _BOOLEAN,
    "hidden_act": _one_of(ACT2FN),
    "initializer_range": _NOT_NEGATIVE,
    "residual_in_fp32": _BOOLEAN,
    "time_step_rank": _Setting(
        "'auto' or an integer >= 1",
        lambda value: value == "auto" or _is_integer(value, 1),
        _plain_integers,
    ),
    "time_step_scale": _POSITIVE,
    "time_step_min": _POSITIVE,
    "time_step_max": _POSITIVE,
    "time_step_init_scheme": _one_of(INIT_SCHEMES),
    "time_step_floor": _NOT_NEGATIVE,
    "rescale_prenorm_residual": _BOOLEAN,
    "use_cache": _BOOLEAN,
    "use_mambapy": _BOOLEAN,
    "use_associative_scan": _BOOLEAN,
    "tie_word_embeddings": _BOOLEAN,
    "dtype": _Setting("a torch.dtype, its name, or None", _is_dtype),
    "output_hidden_states": _MAYBE_BOOLEAN,
    "return_dict": _MAYBE_BOOLEAN,
}


def _check_together(settings: Mapping[str, Any], changed: str) -> None:
    """Refuse values that each are fine and together are not, once all of them are there."""
    if changed in ("hidden_size", "expand") and {"hidden_size", "expand"} <= settings.keys():
        width = settings["expand"] * settings["hidden_size"]
        if width != int(width) or width < 1:
            raise ConfigError(
                f"MambaConfig: expand={settings['expand']} times hidden_size="
                f"{settings['hidden_size']} is {width}, and the inner width must be a whole number"
            )
    steps = ("time_step_min", "time_step_max", "time_step_floor")
    if changed in steps and set(steps) <= settings.keys():
        for name in ("time_step_min", "time_step_floor"):
            if settings[name] > settings["time_step_max"]:
                raise ConfigError(
                    f"MambaConfig: {name}={settings[name]} must not exceed "
                    f"time_step_max={settings['time_step_max']}; set the larger one first"
                )
