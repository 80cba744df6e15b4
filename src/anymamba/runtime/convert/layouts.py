"""A model's config and tensor names as each layout has them: the inverse of `read_config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anymamba.checkpoint import Layout, ModelShape, model_shape
from anymamba.checkpoint.architecture import MAMBA, architecture_of
from anymamba.checkpoint.config import LAYER_FIELDS, MODEL_FIELDS
from anymamba.checkpoint.dtypes import DTYPES
from anymamba.checkpoint.io import shown
from anymamba.errors import ConfigError

# What the other layouts cannot say, and what their programs do.
_FIXED = {"layer_norm_epsilon": 1e-5, "hidden_act": "silu"}


def config_of_layout(config: Mapping[str, Any], layout: Layout, dtype: str) -> dict[str, Any]:
    """Write a config in a layout's own fields; `dtype` is the type that most weights have.

    Returns:
        What belongs into config.json. `read_config` gives the same model for it.

    Raises:
        ConfigError: the layout cannot say something that the model needs.

    Example:
        >>> config = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 10}
        >>> config_of_layout(config, "minimal", "F32")["pad_vocab_size_multiple"]
        1
    """
    shape = model_shape(config)
    if layout == "transformers":
        return _transformers(config, shape, dtype)
    if architecture_of(config) is not MAMBA:
        raise ConfigError(
            f"AnyMamba writes the layout {layout!r} of Mamba alone, and this model is of type "
            f"{architecture_of(config).name!r}: keep the layout 'transformers'"
        )
    for name, value in _FIXED.items():
        if config.get(name, value) != value:
            raise ConfigError(
                f"the layout {layout!r} has no field for {name}, and its programs take {value}; "
                f"this model has {shown(config[name])}: keep the layout 'transformers'"
            )
    fields: dict[str, Any] = {
        "d_model": shape.d_model,
        "n_layer": shape.n_layer,
        "vocab_size": shape.vocab_size,
        "pad_vocab_size_multiple": 1 if shape.vocab_size % 8 else 8,
    }
    layer = {
        "d_state": shape.d_state,
        "d_conv": shape.d_conv,
        "expand": shape.d_inner // shape.d_model,
        "dt_rank": shape.dt_rank,
        "conv_bias": shape.conv_bias,
        "bias": shape.bias,
    }
    if layout == "original":
        return _original(config, fields, layer)
    if not shape.tied:
        raise ConfigError(
            "the layout 'minimal' has no head but the embedding table, and this model has one: "
            "keep the layout 'transformers' or 'original'"
        )
    return fields | layer


def _transformers(config: Mapping[str, Any], shape: ModelShape, dtype: str) -> dict[str, Any]:
    kept = {name: value for name, value in config.items() if name != "torch_dtype"}
    return {
        "architectures": [architecture_of(config).causal_lm],
        **kept,
        "model_type": architecture_of(config).name,
        **shape.fields,
        "expand": shape.d_inner // shape.d_model,
        "dtype": DTYPES[dtype].torch,
    }


def _original(
    config: Mapping[str, Any], fields: dict[str, Any], layer: dict[str, Any]
) -> dict[str, Any]:
    others = {old: config[new] for old, new in LAYER_FIELDS.items() if new in config}
    model = {old: config[new] for old, new in MODEL_FIELDS.items() if new in config}
    return {
        **model,
        **fields,
        "ssm_cfg": others | layer,
        "rms_norm": True,
        "residual_in_fp32": config.get("residual_in_fp32", True),
        "fused_add_norm": True,
        "tie_embeddings": config.get("tie_word_embeddings", True),
    }


def name_in_layout(name: str, layout: Layout) -> str:
    """Translate a tensor's name from Transformers' to a layout's.

    Example:
        >>> name_in_layout("backbone.embeddings.weight", "minimal")
        'embedding.weight'
    """
    if layout == "transformers":
        return name
    name = name.replace("backbone.embeddings.", "backbone.embedding.")
    return name.removeprefix("backbone.") if layout == "minimal" else name


def repeats_head(layout: Layout) -> bool:
    """Whether the layout's own programs want the head in the file though it is the embeddings.

    Example:
        >>> repeats_head("original"), repeats_head("transformers")
        (True, False)
    """
    return layout != "transformers"
