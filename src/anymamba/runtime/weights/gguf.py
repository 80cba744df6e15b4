"""The weights of a GGUF file for the engine."""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING

from anymamba.checkpoint.architecture import MAMBA, in_layer
from anymamba.checkpoint.gguf.blocks import KEPT, PLAIN
from anymamba.checkpoint.gguf.reader import read_gguf
from anymamba.runtime.weights.weight_types import check_weight_type, to_weight_type
from anymamba.runtime.weights.weights import Weights

if TYPE_CHECKING:
    from anymamba.checkpoint.gguf.reader import GgufModel, GgufTensors
    from anymamba.checkpoint.quantization import Tensor

# Writers of GGUF may keep the embedding table in more bits than the rest.
_OF_MOST = next(in_layer(0, row.name) for row in MAMBA.layer if row.role == "large matrix")
# What of them the kernels multiply with as it is.
_NATIVE = {name: name.lower() for name in PLAIN} | {n: f"int{bits}" for n, bits in KEPT.items()}
_GROUP = 32


def load_gguf_weights(
    path: str | os.PathLike[str], weight_type: str = "auto", *, tokenizer: bool = True
) -> tuple[Weights, GgufModel]:
    """Load a GGUF file's weights, and convert what is not of the type asked for.

    Args:
        path: the file.
        weight_type: one of `WEIGHT_TYPES`. Q8_0 is a form of "int8", and Q4_0, Q4_1 and Q4_K are
            forms of "int4"; they are used as they are by "auto" and by their own type, their scales
            rounded to bfloat16. Matrices in the other types with blocks become "int8" in groups of
            32 then. "f32", "bf16" and another type start from the exact values.
        tokenizer: whether the file's tokenizer is wanted.

    Returns:
        The weights, with a remark where types were changed that nobody asked to change, and the
        model for its tokenizer and chat template.

    Raises:
        ConfigError: there is no such type, or it cannot be made of these weights.
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
        >>> weights.weight_type, weights.n_parameters, model.tokenizer_json is not None
        ('int8', 3045888, True)
    """
    check_weight_type(weight_type)
    model = read_gguf(path, keep_blocks=weight_type not in ("f32", "bf16"), tokenizer=tokenizer)
    own = _NATIVE.get(model.tensors.records[_OF_MOST].dtype, "int8")

    if weight_type == "auto" or (weight_type == own and weight_type in ("int8", "int4")):
        tensors, used, changed = _as_stored(model.tensors), own, "int8"
    else:
        tensors, used, changed = (
            to_weight_type(model.tensors, weight_type),
            weight_type,
            weight_type,
        )
    remark = _remark(path, model.tensors, changed) if changed in ("int8", "int4") else None
    stored = model.tensors
    return Weights(model.config, tensors, used, stored.digest, stored.check, remark), model


def _as_stored(stored: GgufTensors) -> dict[str, Tensor]:
    """All tensors, those in types that the kernels lack in 8 bits; one at a time is in float32."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        is_other = stored.records[name].dtype not in _NATIVE
        tensors[name] = to_weight_type({name: tensor}, "int8", _GROUP)[name] if is_other else tensor
    return tensors


def _remark(path: str | os.PathLike[str], stored: GgufTensors, weight_type: str) -> str | None:
    """What to tell of types that are converted."""
    others = Counter(r.dtype for n, r in stored.records.items() if r.dtype not in _NATIVE)
    if not others:
        return None
    found = ", ".join(f"{count} in {dtype}" for dtype, count in sorted(others.items()))
    return (
        f"{os.fspath(path)!r} has tensors that are converted to {weight_type} here ({found}); "
        "weights='bf16' (--weights bf16) keeps more of them, and takes more memory"
    )
