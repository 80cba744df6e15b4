"""Which layout a folder has, and its config.json in Transformers' field names.

Three kinds of config.json describe the same model. Transformers' says `model_type: mamba`. The
original one has `d_model`, with the layers' settings under `ssm_cfg`. That of `minimal.py` holds
the fields of its `ModelArgs`, all at the top.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

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
_REQUIRED = ("d_model", "n_layer", "vocab_size")
_PURE_MAMBA = "AnyMamba reads pure Mamba-1 models with RMSNorm"


def read_config(folder: str | os.PathLike[str]) -> tuple[Layout, dict[str, Any]]:
    """Read a folder's config.json, whichever layout it has.

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
    path = Path(folder) / "config.json"
    fields = read_json_object(path)
    try:
        return translate_config(fields)
    except ConfigError as error:
        raise CheckpointError(f"{str(path)!r}: {error}") from error


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
    config = dict(fields) if layout == "transformers" else _translate(fields, layout)
    if config.get("hidden_act") == "swish":
        config["hidden_act"] = "silu"  # two names of one function, of which all below know one
    model_shape(config)  # refuses a shape that makes no sense
    return layout, config


def _layout(fields: Mapping[str, Any]) -> Layout:
    model_type = fields.get("model_type")
    if model_type == "mamba":
        return "transformers"
    if model_type is not None:
        raise ConfigError(
            f"model_type is {shown(model_type)}, expected 'mamba'; {_PURE_MAMBA} only"
        )
    missing = [name for name in _REQUIRED if name not in fields]
    if missing:
        raise ConfigError(
            "this describes no Mamba model: it has no model_type 'mamba', and for the original "
            f"layout it lacks {listed(missing)}"
        )
    return "original" if "ssm_cfg" in fields else "minimal"


def _translate(fields: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    layer_fields = _ssm_cfg(fields) if layout == "original" else fields
    _refuse_other_architectures(fields)
    config: dict[str, Any] = {"model_type": "mamba"}
    config |= {new: fields[old] for old, new in MODEL_FIELDS.items() if old in fields}
    config |= {new: layer_fields[old] for old, new in LAYER_FIELDS.items() if old in layer_fields}
    config["vocab_size"] = _padded_vocabulary(fields)
    return config


def _ssm_cfg(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    ssm_cfg = fields["ssm_cfg"] if fields["ssm_cfg"] is not None else {}
    if not isinstance(ssm_cfg, dict):
        raise ConfigError(f"ssm_cfg must be an object, got {shown(ssm_cfg)}")
    layer = ssm_cfg.get("layer", "Mamba1")
    if layer != "Mamba1":
        raise ConfigError(f"ssm_cfg.layer is {shown(layer)}, expected 'Mamba1'; {_PURE_MAMBA}")
    # use_fast_path picks between kernels of the same result.
    unknown = [shown(name) for name in ssm_cfg.keys() - LAYER_FIELDS - {"layer", "use_fast_path"}]
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
