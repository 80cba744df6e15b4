"""A GGUF file as PyTorch's models take it: fields of a config, and torch tensors.

The reader is the runtime's, which `modeling` does not know. This file knows both.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from anymamba.checkpoint.architecture import ARCHITECTURES, architecture_of
from anymamba.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray


def find_mamba_gguf(place: Path) -> Path | None:
    """The GGUF file that a place stands for, if it is there and says nothing of another model.

    Args:
        place: any path: a file's, or that of a folder which may hold a GGUF file alone.

    Returns:
        The file, or None: also for a folder with a `config.json`, whose model is not the file's.

    Raises:
        CheckpointError: the folder holds several GGUF files.

    Example:
        >>> find_mamba_gguf(Path("state-spaces/mamba-130m-hf"))
    """
    from anymamba.checkpoint.gguf import find_gguf
    from anymamba.checkpoint.gguf.header import read_gguf_header

    path = None if (place / "config.json").is_file() else find_gguf(place)
    if path is None or not path.is_file():
        return None
    try:
        architecture = read_gguf_header(path).metadata.get("general.architecture", "mamba")
    except CheckpointError:
        return path  # who reads it says what is wrong
    return path if architecture in {known.gguf for known in ARCHITECTURES.values()} else None


def hub_pattern(gguf_file: str) -> str:
    """The pattern of the files to download for a GGUF file: all parts, where it is in parts.

    Example:
        >>> hub_pattern("mamba-00001-of-00003.gguf")
        'mamba-*-of-00003.gguf'
    """
    return re.sub(r"-\d{5}(-of-\d{5}\.gguf)$", r"-*\1", gguf_file)


def gguf_config(path: Path) -> dict[str, Any]:
    """The config of the Mamba in a GGUF file, in Transformers' names.

    Raises:
        CheckpointError: the file is broken, or holds no Mamba.

    Example:
        >>> import tempfile
        >>> from anymamba.assets import bundled_model
        >>> from anymamba.runtime.convert import convert
        >>> file = convert(bundled_model(), tempfile.mkdtemp() + "/model.gguf", "gguf")
        >>> gguf_config(Path(file))["num_hidden_layers"]
        7
    """
    from anymamba.checkpoint.gguf.reader import read_gguf

    config = read_gguf(path, tokenizer=False).config
    return {"architectures": [architecture_of(config).causal_lm], **config}


def gguf_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of the Mamba in a GGUF file, copied out of it, by Transformers' names.

    F32, F16 and BF16 keep their types; what is quantized becomes float32.

    Raises:
        CheckpointError: the file is broken, or holds no Mamba.
        MissingDependencyError: quantized tensors need the `gguf` package.

    Example:
        >>> import tempfile
        >>> from anymamba.assets import bundled_model
        >>> from anymamba.runtime.convert import convert
        >>> file = convert(bundled_model(), tempfile.mkdtemp() + "/model.gguf", "gguf")
        >>> gguf_state_dict(Path(file))["backbone.norm_f.weight"].shape
        torch.Size([256])
    """
    from anymamba.checkpoint.gguf.reader import read_gguf
    from anymamba.checkpoint.torch_weights import to_torch

    tensors = read_gguf(path, tokenizer=False).tensors
    # Blocks are kept only where they are asked for.
    return {name: to_torch(cast("NDArray[Any]", tensors[name])) for name in tensors}
