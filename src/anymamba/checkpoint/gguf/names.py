"""What GGUF calls the tensors of a Mamba, and in which form it keeps them.

| Transformers | GGUF | |
| --- | --- | --- |
| `backbone.embeddings.weight` | `token_embd.weight` | |
| `backbone.layers.0.norm.weight` | `blk.0.attn_norm.weight` | and the layer's others, as below |
| `...mixer.conv1d.weight` (e, 1, k) | `blk.0.ssm_conv1d.weight` (e, k) | |
| `...mixer.A_log` | `blk.0.ssm_a` | A itself, which is -exp(A_log) |
| `backbone.norm_f.weight` | `output_norm.weight` | |
| `lm_head.weight` | `output.weight` | absent where it is the embedding table |
"""

from __future__ import annotations

import os
from pathlib import Path

from anymamba.checkpoint.names import EMBEDDINGS, HEAD

__all__ = ["from_gguf_name", "is_gguf", "is_matrix", "to_gguf_name"]

_WHOLE = {
    EMBEDDINGS: "token_embd.weight",
    "backbone.norm_f.weight": "output_norm.weight",
    HEAD: "output.weight",
}
_LAYER = {
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.x_proj.weight": "ssm_x.weight",
    "mixer.dt_proj.weight": "ssm_dt.weight",
    "mixer.dt_proj.bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.out_proj.weight": "ssm_out.weight",
}
_WHOLE_BACK = {theirs: ours for ours, theirs in _WHOLE.items()}
_LAYER_BACK = {theirs: ours for ours, theirs in _LAYER.items()}
_MATRICES = ("_proj.weight", "embeddings.weight", "lm_head.weight")


def to_gguf_name(name: str) -> str:
    """Translate a tensor's name from Transformers' to GGUF's.

    Raises:
        KeyError: GGUF has no such tensor.

    Example:
        >>> to_gguf_name("backbone.layers.3.mixer.D")
        'blk.3.ssm_d'
    """
    if name in _WHOLE:
        return _WHOLE[name]
    layer, _, part = name.removeprefix("backbone.layers.").partition(".")
    return f"blk.{layer}.{_LAYER[part]}"


def from_gguf_name(name: str) -> str:
    """Translate a tensor's name from GGUF's to Transformers'.

    Returns:
        Transformers' name. A name that no Mamba has is returned as it is, to be reported so.

    Example:
        >>> from_gguf_name("blk.3.ssm_d"), from_gguf_name("blk.3.attn_q.weight")
        ('backbone.layers.3.mixer.D', 'blk.3.attn_q.weight')
    """
    if name in _WHOLE_BACK:
        return _WHOLE_BACK[name]
    block, layer, part = (*name.split(".", 2), "", "")[:3]
    # int() would take "٣" and "+3" too, and 03 would be a second name of layer 3.
    if block != "blk" or part not in _LAYER_BACK or not _is_number(layer):
        return name
    return f"backbone.layers.{layer}.{_LAYER_BACK[part]}"


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and (text == "0" or text[0] != "0")


def is_matrix(name: str) -> bool:
    """Whether a tensor, by Transformers' name, is a matrix that multiplies: one worth narrowing.

    Example:
        >>> is_matrix("backbone.layers.0.mixer.in_proj.weight")
        True
        >>> is_matrix("backbone.layers.0.mixer.conv1d.weight")
        False
    """
    return name.endswith(_MATRICES)


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a name is that of a GGUF file.

    Example:
        >>> is_gguf("model.gguf"), is_gguf("state-spaces/mamba-130m-hf")
        (True, False)
    """
    return Path(path).suffix.lower() == ".gguf"
