"""The keyword arguments of `from_pretrained`, and what becomes of each.

Transformers takes more than forty of them. Those about files are met here, because the files may
be in any layout; those about placing and storing the weights are passed on; those that have no
meaning for a Mamba are refused by name. docs/transformers.md is the table of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from anymamba.checkpoint.architecture import ARCHITECTURES
from anymamba.errors import InputError
from anymamba.modeling.config import CONFIGS

PLACE = {
    "revision": "revision",
    "cache_dir": "cache_dir",
    "token": "token",
    "subfolder": "subfolder",
    "force_download": "force_download",
    "local_files_only": "offline",
}
"""Where a model is found: Transformers' names, and those of `anymamba.checkpoint.resolve`."""

FILES = (
    *("config", "state_dict", "gguf_file", "variant", "use_safetensors", "weights_only"),
    *("key_mapping", "ignore_mismatched_sizes", "adapter_kwargs", "adapter_name"),
    *("output_loading_info", "generation_config"),
)
"""Which of a folder's files count, and how they are read."""

PASSED_ON = (
    *("dtype", "torch_dtype", "device_map", "max_memory", "offload_folder", "offload_buffers"),
    *("quantization_config", "attn_implementation", "experts_implementation", "disable_mmap"),
    *("use_kernels", "kernel_config", "allow_all_kernels", "trust_remote_code"),
    *("tqdm_class", "_from_auto", "_from_pipeline", "_commit_hash"),
    # Without effect in Transformers as well, which keeps them for old programs.
    *("low_cpu_mem_usage", "offload_state_dict", "mirror", "_fast_init"),
)
"""What is Transformers' own, and means the same for a Mamba."""

_NO_PLAN = (
    "a Mamba has no plan for tensor parallelism; split it with device_map, or train it with "
    "FSDP through accelerate"
)
REFUSED: Mapping[str, str] = {
    "tp_plan": _NO_PLAN,
    "tp_size": _NO_PLAN,
    "device_mesh": _NO_PLAN,
    "distributed_config": _NO_PLAN,
    "fusion_config": "there is nothing in a Mamba that it fuses; leave it out",
    "proxies": "the hub's client takes proxies from the environment: set HTTPS_PROXY",
    "from_tf": "AnyMamba reads PyTorch's weights; convert the model with Transformers 4 first",
    "from_flax": "AnyMamba reads PyTorch's weights; convert the model with Transformers 4 first",
}
"""What is refused, and why."""

_LOADERS = {*PLACE, *FILES, *PASSED_ON, *REFUSED}


def refuse_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments without a meaning for a Mamba; None and False ask for nothing.

    Raises:
        InputError: the message names the argument.

    Example:
        >>> refuse_arguments({"tp_plan": None})
    """
    for name, reason in REFUSED.items():
        if arguments.get(name) not in (None, False):
            raise InputError(f"{name}: {reason}")


def take_place(arguments: dict[str, Any]) -> dict[str, Any]:
    """Take out the arguments that say where a model is found, named as `resolve` has them.

    Example:
        >>> take_place({"revision": "main", "token": None})
        {'revision': 'main'}
    """
    given = {PLACE[name]: arguments.pop(name) for name in PLACE if name in arguments}
    return {name: value for name, value in given.items() if value is not None}


def make_config(cls: Any, stored: Mapping[str, Any], arguments: dict[str, Any]) -> Any:
    """The config of the model to build: what was given, else what is stored, with changes.

    Args:
        cls: the model's class.
        stored: the fields in the model's files, in Transformers' names.
        arguments: of a call of `from_pretrained`. `config` is taken out; where it is no config
            itself, so are the config's fields, which take precedence.

    Raises:
        ConfigError: for a value that makes no sense.
    """
    given = arguments.pop("config", None)
    if isinstance(given, PreTrainedConfig):
        return own_config(given)
    config_class = cls.config_class
    if given is not None:
        stored = config_class.get_config_dict(given)[0]
    check_architecture(cls, stored.get("model_type"))
    fields = {name: arguments.pop(name) for name in list(arguments) if name not in _LOADERS}
    config, unused = config_class.from_dict(dict(stored), return_unused_kwargs=True, **fields)
    arguments |= unused
    return config


def check_architecture(cls: Any, found: object) -> None:
    """Refuse a model of another architecture than a class builds: it would compute something else.

    Args:
        cls: the model's class.
        found: the `model_type` of the model; None where nothing says.

    Raises:
        InputError: the message names both, and the class to use.
    """
    wanted = cls.config_class.model_type
    if found in CONFIGS and wanted in CONFIGS and found != wanted:
        raise InputError(
            f"this is a model of type {found!r}, and {cls.__name__} builds {wanted!r}; use "
            f"{ARCHITECTURES[str(found)].causal_lm}, or call anymamba.register() and use "
            "AutoModelForCausalLM"
        )


def set_generation_config(model: Any, folder: Path, given: GenerationConfig | None = None) -> None:
    """Give a model that generates the settings that were passed, else those in its folder."""
    if not model.can_generate():
        return
    if given is not None:
        model.generation_config = given
    elif (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)


def own_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A config as our models take it: Transformers' own becomes ours.

    Args:
        config: any config; of another class than Transformers' it stays.

    Example:
        >>> import transformers
        >>> theirs = transformers.models.mamba.configuration_mamba.MambaConfig(hidden_size=64)
        >>> type(own_config(theirs)).__module__
        'anymamba.modeling.config'
    """
    ours = CONFIGS.get(config.model_type)
    if ours is None or isinstance(config, ours):
        return config
    if not type(config).__module__.startswith("transformers."):
        return config
    return ours.from_dict(config.to_dict())  # type: ignore[no-any-return]
