"""The weights of a GGUF file for the engine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from anymamba.checkpoint import bytes_digest
from anymamba.runtime.gguf_reading import read_gguf
from anymamba.runtime.kinds import check_kind, convert
from anymamba.runtime.weights import Weights

if TYPE_CHECKING:
    from anymamba.runtime.gguf_reading import GgufModel
    from anymamba.runtime.kinds import Tensor

__all__ = ["load_gguf_weights"]

# Writers of GGUF may keep the embedding table in more bits than the rest.
_OF_MOST = "backbone.layers.0.mixer.in_proj.weight"
_KINDS = {"F32": "f32", "F16": "f16", "BF16": "bf16", "Q8_0": "int8", "Q4_0": "int4"}


def load_gguf_weights(
    path: str | os.PathLike[str], kind: str = "auto", *, tokenizer: bool = True
) -> tuple[Weights, GgufModel]:
    """Load a GGUF file's weights, and convert what is not of the kind asked for.

    Args:
        path: the file.
        kind: one of `kinds.KINDS`. Q8_0 is a form of "int8" and Q4_0 one of "int4"; both are used
            as they are by "auto" and by their own kind, their scales rounded to bfloat16. "f32"
            and "bf16" start from their exact values, which needs the `gguf` package.
        tokenizer: whether the file's tokenizer is wanted.

    Returns:
        The weights, and the model for its tokenizer and chat template.

    Raises:
        ConfigError: there is no such kind, or it cannot be made of these weights.
        CheckpointError: the file cannot be read.
        MissingDependencyError: the `gguf` package is needed and not installed.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from anymamba.assets import bundled_model
        >>> from anymamba.runtime.convert import convert
        >>> file = Path(tempfile.mkdtemp()) / "model.gguf"
        >>> _ = convert(bundled_model(), file, "gguf", "q8_0")
        >>> weights, model = load_gguf_weights(file)
        >>> weights.kind, weights.n_parameters, model.tokenizer_json is not None
        ('int8', 3045888, True)
    """
    check_kind(kind)
    model = read_gguf(path, keep_blocks=kind not in ("f32", "bf16"), tokenizer=tokenizer)
    tensors: dict[str, Tensor] = dict(model.tensors)
    own = _KINDS[model.tensors.records[_OF_MOST].dtype]

    def digest() -> str:
        stored = model.tensors
        return bytes_digest(
            {n: (r.dtype, r.shape, stored.bytes_of(n)) for n, r in stored.records.items()}
        )

    if kind == "auto" or (kind == own and kind in ("int8", "int4")):
        return Weights(model.config, tensors, own, digest, model.tensors.check), model
    return Weights(model.config, convert(tensors, kind), kind, digest, model.tensors.check), model
