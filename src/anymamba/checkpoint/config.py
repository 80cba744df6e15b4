"""Which layout a folder has, and its config.json in Transformers' field names.

Three kinds of config.json describe the same model. Transformers' says `model_type: mamba`. The
original one has `d_model`, with the layers' settings under `ssm_cfg`. That of `minimal.py` holds
the fields of its `ModelArgs`, all at the top. In Mistral's own form of Codestral-Mamba there is a
`params.json` in its place, with fields of their own around the original's model.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from anymamba.checkpoint.architecture import MAMBA, MAMBA2, architecture_of
from anymamba.checkpoint.io import listed, read_json_object, shown
from anymamba.checkpoint.shapes import model_shape
from anymamba.errors import CheckpointError, ConfigError

Layout = Literal["transformers", "original", "minimal"]

# The names below are those of the original layout; behind them, Transformers'.
MODEL_FIELDS = {
    "d_model": "hidden_size",
    "n_layer": "num_hidden_layers",
    "vocab_size": "vocab_size",
    "residual_in_fp32": "residual_in_fp32",
    "tie_embeddings": "tie_word_embeddings",
}
LAYER_FIELDS = {
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "expand": "expand",
    "dt_rank": "time_step_rank",
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_init": "time_step_init_scheme",
    "dt_scale": "time_step_scale",
    "dt_init_floor": "time_step_floor",
    "conv_bias": "use_conv_bias",
    "bias": "use_bias",
}
_SHARED = ("d_state", "d_conv", "expand", "dt_min", "dt_max", "dt_init_floor", "conv_bias", "bias")
_MAMBA2_FIELDS = {name: LAYER_FIELDS[name] for name in _SHARED} | {
    "headdim": "head_dim",
    "ngroups": "n_groups",
    "chunk_size": "chunk_size",
    "dt_limit": "time_step_limit",
    "rmsnorm": "use_gated_norm",
    "norm_before_gate": "gate_after_norm",
}
# What the original's layer takes where nothing is said, and Transformers' config does not; and the
# end of text of GPT-NeoX's tokenizer, which the authors' models have.
_MAMBA2_DEFAULTS = {
    "n_groups": 1,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
# What has no field in a config here.
_MAMBA2_FIXED = {"D_has_hdim": False, "d_ssm": None}
# They pick between kernels of the same result, or the weights before training.
_WITHOUT_EFFECT = ("use_fast_path", "use_mem_eff_path", "A_init_range", "conv_init")
_REQUIRED = ("d_model", "n_layer", "vocab_size")
PARAMS = "params.json"
"""The config in Mistral's form."""

# The original's fields by those of Mistral's form. The layer is always Mamba-2's.
_OF_PARAMS = {
    "dim": "d_model",
    "n_layers": "n_layer",
    "n_groups": "ngroups",
    **{name: name for name in ("vocab_size", "pad_vocab_size_multiple", "tie_embeddings")},
    **{name: name for name in ("rms_norm", "residual_in_fp32", "fused_add_norm")},
}
# Of Mistral's tokenizer, in which 0 is the unknown token.
_TOKENS_OF_PARAMS = {"bos_token_id": 1, "eos_token_id": 2}
_PURE_MAMBA = "of the original layout AnyMamba reads Mamba and Mamba-2 models with RMSNorm alone"


def read_config(folder: str | os.PathLike[str]) -> tuple[Layout, dict[str, Any]]:
    """Read a folder's config.json, whichever layout it has, or its params.json.

    Args:
        folder: the model's folder.

    Returns:
        The layout, and the config's fields in Transformers' names. From a Transformers config
        every field is kept; from the others those that have a counterpart, the vocabulary
        rounded up as the weights are.

    Raises:
        CheckpointError: config.json is missing or broken, describes another kind of model, or
            has a shape that makes no sense; the message names the field.

    Example:
        >>> import json, tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> fields = {"d_model": 32, "n_layer": 2, "vocab_size": 50, "ssm_cfg": {"d_state": 8}}
        >>> _ = (folder / "config.json").write_text(json.dumps(fields))
        >>> layout, config = read_config(folder)
        >>> layout, config["hidden_size"], config["state_size"], config["vocab_size"]
        ('original', 32, 8, 56)
    """
    path = config_file(folder)
    fields = read_json_object(path)
    try:
        return _translate_params(fields) if path.name == PARAMS else translate_config(fields)
    except ConfigError as error:
        raise CheckpointError(f"{str(path)!r}: {error}") from error


def config_file(folder: str | os.PathLike[str]) -> Path:
    """The file of a model's folder that describes the model.

    Args:
        folder: the model's folder.

    Returns:
        Its config.json; its params.json where only that is there.

    Example:
        >>> config_file("model").name
        'config.json'
    """
    params = Path(folder) / PARAMS
    path = params.with_name("config.json")
    return params if params.is_file() and not path.is_file() else path


def _translate_params(params: Mapping[str, Any]) -> tuple[Layout, dict[str, Any]]:
    """As `translate_config`, of the fields of a params.json."""
    kind = params.get("model_type", "mamba")
    if kind != "mamba":
        raise ConfigError(f"model_type is {shown(kind)}, expected 'mamba'")
    missing = [name for name in ("dim", "n_layers", "n_groups", "vocab_size") if name not in params]
    unknown = [shown(name) for name in params.keys() - _OF_PARAMS.keys() - {"model_type"}]
    if missing or unknown:
        problem = (
            f"lacks {listed(missing)}" if missing else f"has unknown {listed(sorted(unknown))}"
        )
        raise ConfigError(f"this describes no model of the form of Codestral-Mamba: it {problem}")
    fields = {new: params[old] for old, new in _OF_PARAMS.items() if old in params}
    layer = {"layer": "Mamba2", "ngroups": fields.pop("ngroups")}
    layout, config = translate_config({**fields, "ssm_cfg": layer})
    return layout, config | _TOKENS_OF_PARAMS


def translate_config(fields: Mapping[str, Any]) -> tuple[Layout, dict[str, Any]]:
    """Bring the fields of a config.json of any layout into the form that `read_config` returns.

    Raises:
        ConfigError: they describe another kind of model, or a shape that makes no sense.

    Example:
        >>> layout, config = translate_config({"d_model": 32, "n_layer": 2, "vocab_size": 50})
        >>> layout, config["hidden_size"]
        ('minimal', 32)
    """
    layout = _layout(fields)
    config = _with_infinity(fields) if layout == "transformers" else _translate(fields, layout)
    if config.get("hidden_act") == "swish":
        config["hidden_act"] = "silu"  # two names of one function, of which all below know one
    model_shape(config)  # refuses a shape that makes no sense
    return layout, config


def _layout(fields: Mapping[str, Any]) -> Layout:
    model_type = fields.get("model_type")
    if model_type is not None:
        architecture_of(fields)  # refuses what there is none of
        return "transformers"
    missing = [name for name in _REQUIRED if name not in fields]
    if missing:
        raise ConfigError(
            "this describes no Mamba model: it has no model_type 'mamba', and for the original "
            f"layout it lacks {listed(missing)}"
        )
    return "original" if "ssm_cfg" in fields else "minimal"


def _with_infinity(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of Transformers' config, which writes infinity, for which JSON has no word, so."""
    infinity = {"__float__": "Infinity"}
    limits = fields.get("time_step_limit")
    if not isinstance(limits, list):
        return dict(fields)
    return {**fields, "time_step_limit": [math.inf if v == infinity else v for v in limits]}


def _translate(fields: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    layer = _ssm_cfg(fields) if layout == "original" else fields
    is_mamba2 = layout == "original" and layer.get("layer") == "Mamba2"
    _refuse_other_architectures(fields)
    config: dict[str, Any] = {"model_type": (MAMBA2 if is_mamba2 else MAMBA).name}
    config |= {new: fields[old] for old, new in MODEL_FIELDS.items() if old in fields}
    names = _MAMBA2_FIELDS if is_mamba2 else LAYER_FIELDS
    config |= {new: layer[old] for old, new in names.items() if old in layer}
    if is_mamba2:
        config = _MAMBA2_DEFAULTS | config
        config["num_heads"] = _heads(config)
    config["vocab_size"] = _padded_vocabulary(fields)
    return config


def _heads(config: Mapping[str, Any]) -> int:
    """The number of heads, which the original layout leaves to the program."""
    sizes = [config.get("hidden_size"), config.get("expand", 2), config["head_dim"]]
    if not all(type(size) is int and size > 0 for size in sizes):
        raise ConfigError(f"d_model, expand and headdim are {shown(sizes)}, expected whole numbers")
    inner = sizes[0] * sizes[1]
    if inner % sizes[2]:
        raise ConfigError(f"headdim is {sizes[2]}, which does not divide the inner width {inner}")
    return int(inner // sizes[2])


def _ssm_cfg(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    ssm_cfg = fields["ssm_cfg"] if fields["ssm_cfg"] is not None else {}
    if not isinstance(ssm_cfg, dict):
        raise ConfigError(f"ssm_cfg must be an object, got {shown(ssm_cfg)}")
    layer = ssm_cfg.get("layer", "Mamba1")
    if layer not in ("Mamba1", "Mamba2"):
        raise ConfigError(
            f"ssm_cfg.layer is {shown(layer)}, expected 'Mamba1' or 'Mamba2'; {_PURE_MAMBA}"
        )
    fixed = _MAMBA2_FIXED if layer == "Mamba2" else {}
    for name, value in fixed.items():
        if ssm_cfg.get(name, value) != value:
            raise ConfigError(
                f"ssm_cfg.{name} is {shown(ssm_cfg[name])}, expected {value}, as all published "
                "Mamba-2 models have it; run the model under the drop-in (docs/drop-in.md)"
            )
    names = _MAMBA2_FIELDS if layer == "Mamba2" else LAYER_FIELDS
    known = names.keys() | fixed.keys() | {"layer", *_WITHOUT_EFFECT}
    unknown = [shown(name) for name in ssm_cfg.keys() - known]
    if unknown:
        raise ConfigError(f"ssm_cfg has unknown {listed(sorted(unknown))}; {_PURE_MAMBA}")
    return ssm_cfg


def _refuse_other_architectures(fields: Mapping[str, Any]) -> None:
    for name, pure in {"rms_norm": True, "attn_layer_idx": [], "d_intermediate": 0}.items():
        value = fields.get(name, pure)
        if value is not None and value != pure:
            raise ConfigError(f"{name} is {shown(value)}, expected {pure}; {_PURE_MAMBA}")


def _padded_vocabulary(fields: Mapping[str, Any]) -> int:
    """The number of rows that the embedding table has."""
    multiple = fields.get("pad_vocab_size_multiple", 8)
    size = fields["vocab_size"]
    for name, value in {"pad_vocab_size_multiple": multiple, "vocab_size": size}.items():
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name} must be a whole number of at least 1, got {shown(value)}")
    padded: int = size + -size % multiple
    return padded
