"""What GGUF calls the tensors of a Mamba.

The names stand in `anymamba.checkpoint.architecture`, as do the shapes, of which some are others:
a convolution (e, 1, k) is (e, k) in GGUF. Instead of A_log there is A itself, -exp(A_log).
"""

from __future__ import annotations

import os
from pathlib import Path

from anymamba.checkpoint.architecture import ARCHITECTURES, MAMBA, Architecture, in_layer
from anymamba.renamed import old_names

__getattr__ = old_names(__name__)

NORMS_MAPS = "mamba.ssm.dt_b_c_rms"
"""Whether a Mamba is a Falcon-Mamba."""

MIXER_EPSILON = "anymamba.mixer_rms_eps"
"""The epsilon of a Falcon-Mamba's norms of dt, B and C. llama.cpp takes that of the layers."""

_OUTSIDE = {row.gguf: row.name for row in MAMBA.outside if row.gguf}
_IN_LAYER = {
    architecture.gguf: {row.gguf: row.name for row in architecture.layer if row.gguf}
    for architecture in ARCHITECTURES.values()
}
_GGUF = {
    ours: theirs for names in (_OUTSIDE, *_IN_LAYER.values()) for theirs, ours in names.items()
}


def to_gguf_name(name: str) -> str:
    """Translate a tensor's name from Transformers' to GGUF's.

    Raises:
        KeyError: GGUF has no such tensor.

    Example:
        >>> to_gguf_name("backbone.layers.3.mixer.D")
        'blk.3.ssm_d'
    """
    layer, _, part = name.removeprefix("backbone.layers.").partition(".")
    return f"blk.{layer}.{_GGUF[part]}" if in_layer(layer, part) == name else _GGUF[name]


def from_gguf_name(name: str, architecture: Architecture = MAMBA) -> str:
    """Translate a tensor's name from GGUF's to Transformers'.

    Args:
        name: GGUF's.
        architecture: the model's.

    Returns:
        Transformers' name. A name that no such model has is returned as it is, to be reported so.

    Example:
        >>> from_gguf_name("blk.3.ssm_d"), from_gguf_name("blk.3.attn_q.weight")
        ('backbone.layers.3.mixer.D', 'blk.3.attn_q.weight')
    """
    block, layer, part = (*name.split(".", 2), "", "")[:3]
    ours = _IN_LAYER[architecture.gguf].get(part)
    # int() would take "٣" and "+3" too, and 03 would be a second name of layer 3.
    if block == "blk" and ours and _is_number(layer):
        return in_layer(layer, ours)
    return _OUTSIDE.get(name, name)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and (text == "0" or text[0] != "0")


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a name is that of a GGUF file.

    Example:
        >>> is_gguf("model.gguf"), is_gguf("state-spaces/mamba-130m-hf")
        (True, False)
    """
    return Path(path).suffix.lower() == ".gguf"
