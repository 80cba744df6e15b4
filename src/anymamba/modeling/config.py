"""What a Mamba model is: its sizes, its options, and the numbers it is initialized from.

`MambaConfig` has the fields of Transformers' Mamba, so that either library loads what the other
wrote. What it adds is that no value is taken unseen: each assignment is checked, at construction
as well as later, and a wrong one is refused with a line that names the field and the value.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedConfig

from anymamba.checkpoint.architecture import architecture_of
from anymamba.checkpoint.config import PARAMS, config_file, read_config, translate_config
from anymamba.checkpoint.io import user_path
from anymamba.errors import ConfigError
from anymamba.modeling.config_checks import SETTINGS, check_together, shown_value
from anymamba.modeling.gguf import find_mamba_gguf, gguf_config
from anymamba.renamed import old_names

__getattr__ = old_names(__name__)

# Transformers renamed its layer types once; files of either age are about the same layer.
_LAYER_TYPES = ("linear_attention", "mamba")

# Arguments that say where a config is read from. `gguf_file` is none: the Auto classes pass what is
# left to the model, which reads its weights from that file.
_PLACE = {
    *("cache_dir", "force_download", "proxies", "token", "local_files_only"),
    *("revision", "subfolder", "trust_remote_code", "_from_pipeline", "_from_auto"),
}


class StateSpaceConfig(PreTrainedConfig):
    """What the configs of all architectures share: checks, derived fields, reading and writing."""

    vocab_size: int
    hidden_size: int
    state_size: int
    num_hidden_layers: int
    expand: int | float
    conv_kernel: int
    time_step_rank: int | str

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # Transformers makes a dataclass of each config, which would compare declared fields only.
        cls.__eq__ = StateSpaceConfig.__eq__  # type: ignore[method-assign]
        super().__init_subclass__(**kwargs)

    def __post_init__(self, **kwargs: Any) -> None:
        if self.time_step_rank == "auto":
            self.time_step_rank = math.ceil(self.hidden_size / 16)
        super().__post_init__(**kwargs)
        # Warns of token ids outside the vocabulary. They are no error: files on the hub have
        # them, and so has every model whose embedding was cut down.
        self.validate_token_ids()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in SETTINGS:
            try:
                value = SETTINGS[name].check(name, value)
                check_together({**self.__dict__, name: value}, changed=name)
            except ConfigError as error:
                raise ConfigError(f"{type(self).__name__}: {error}") from None
        super().__setattr__(name, value)

    # Equality by what the configs say, kept unknown fields included. A dataclass would compare
    # its declared fields only, and among them the version of the library that wrote a file.
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, StateSpaceConfig):
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
                f"{type(self).__name__}: intermediate_size must be expand * hidden_size = "
                f"{self.intermediate_size}, got {shown_value(value)}; set expand or hidden_size "
                "instead"
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
                f"{type(self).__name__}: layer_types must be 'linear_attention' for each of the "
                f"{self.num_hidden_layers} layers, got {shown_value(value)}"
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


class MambaConfig(StateSpaceConfig):
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


class FalconMambaConfig(MambaConfig):
    """The configuration of a Falcon-Mamba model: a Mamba that norms dt, B and C in each mixer.

    Args (all by keyword): those of `MambaConfig`, and
        mixer_rms_eps: added to the mean square in each of the three norms.
        use_falcon_mambapy: an older name of use_mambapy.

    Raises:
        ConfigError: for a value that makes no sense, at construction and at each assignment.

    Example:
        >>> FalconMambaConfig(hidden_size=64, num_hidden_layers=2).mixer_rms_eps
        1e-06

    Source: Zuo et al., "Falcon Mamba: The First Competitive Attention-free 7B Language Model"
    (arXiv 2410.05355); the field names are Transformers'.
    """

    model_type = "falcon_mamba"

    mixer_rms_eps: float = 1e-6

    def __post_init__(self, **kwargs: Any) -> None:
        self.use_mambapy = kwargs.pop("use_falcon_mambapy", self.use_mambapy)
        super().__post_init__(**kwargs)


class Mamba2Config(StateSpaceConfig):
    """The configuration of a Mamba-2 model.

    Args (all by keyword): those of `MambaConfig` but for `use_mambapy`, `use_associative_scan`,
        `time_step_scale` and `time_step_init_scheme`, with Transformers' defaults, and
        num_heads: h; num_heads * head_dim must be expand * hidden_size.
        head_dim: p, the channels of a head.
        n_groups: g, how many groups of heads have B and C of their own; it divides num_heads.
        chunk_size: how many positions one matrix product takes together. Results do not depend
            on it.
        time_step_limit: the least and the largest step size.
        time_step_rank: accepted for Transformers' sake.
        use_gated_norm: whether a mixer has a norm beside its gate: the authors' `rmsnorm`.
        gate_after_norm: whether that norm comes before the gate rather than behind it: the authors'
            `norm_before_gate`. Transformers has neither field and computes what the defaults say,
            also for files that hold a `norm_before_gate`, as Codestral-Mamba's does.

    Raises:
        ConfigError: for a value that makes no sense, at construction and at each assignment.

    Example:
        >>> config = Mamba2Config(hidden_size=64, num_heads=8, head_dim=16, n_groups=2)
        >>> config.intermediate_size, config.conv_channels
        (128, 640)

    Source: Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through
    Structured State Space Duality", 2024; the field names are Transformers'.
    """

    model_type = "mamba2"

    num_heads: int = 128
    head_dim: int = 64
    vocab_size: int = 32768
    hidden_size: int = 4096
    state_size: int = 128
    num_hidden_layers: int = 64
    layer_norm_epsilon: float = 1e-5
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    expand: int | float = 2
    conv_kernel: int = 4
    n_groups: int = 8
    use_bias: bool = False
    use_conv_bias: bool = True
    hidden_act: str = "silu"
    initializer_range: float = 0.1
    residual_in_fp32: bool = True
    time_step_rank: int | str = "auto"
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_limit: tuple[float, float] | list[float] = (0.0, math.inf)
    rescale_prenorm_residual: bool = False
    use_cache: bool = True
    chunk_size: int = 256
    tie_word_embeddings: bool = False
    use_gated_norm: bool = True
    gate_after_norm: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.validate_architecture()

    def validate_architecture(self) -> None:
        """Refuse heads that do not fit the inner width, or groups that do not fit the heads.

        Raises:
            ConfigError: the message names the numbers.
        """
        if self.num_heads * self.head_dim != self.intermediate_size:
            raise ConfigError(
                f"Mamba2Config: num_heads={self.num_heads} times head_dim={self.head_dim} must be "
                f"expand * hidden_size = {self.intermediate_size}"
            )
        if self.num_heads % self.n_groups:
            raise ConfigError(
                f"Mamba2Config: n_groups={self.n_groups} must divide num_heads={self.num_heads}"
            )

    @property
    def conv_channels(self) -> int:
        """What the convolution sees: x, B and C."""
        return self.intermediate_size + 2 * self.n_groups * self.state_size


CONFIGS: Mapping[str, type[StateSpaceConfig]] = {
    cls.model_type: cls for cls in (MambaConfig, FalconMambaConfig, Mamba2Config)
}
"""The config class of each architecture."""


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
    if config_file(user_path(name)).name == PARAMS:
        left = {key: value for key, value in kwargs.items() if key not in _PLACE}
        fields = read_config(user_path(name))[1]
        return fields | {"architectures": [architecture_of(fields).causal_lm]}, left
    fields, left = read(name, **kwargs)
    if "model_type" not in fields and {"d_model", "n_layer"} <= fields.keys():
        config = translate_config(fields)[1]
        return config | {"architectures": [architecture_of(config).causal_lm]}, left
    return fields, left
