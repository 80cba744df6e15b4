"""A checkpoint's weights, checked against its config and ready for the native core.

What is stored in the type asked for is mapped from its file, not copied: loading it costs nothing,
and processes share it. The rest is converted (`kinds`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from anymamba.checkpoint import (
    Checkpoint,
    TensorRecord,
    bytes_digest,
    check_tensors,
    expected_shapes,
)
from anymamba.checkpoint.architecture import EMBEDDINGS, HEAD
from anymamba.checkpoint.dtypes import dtype_of
from anymamba.checkpoint.quantized_folder import quantized_bits, quantized_shapes
from anymamba.checkpoint.safetensors.mmap import FileMap
from anymamba.errors import CheckpointError, ConfigError
from anymamba.runtime.weights.weight_types import check_kind, convert

if TYPE_CHECKING:
    from anymamba.checkpoint.quantization import Tensor

__all__ = ["Weights", "load_weights"]


@dataclass(frozen=True)
class Weights:
    """All tensors of a model.

    Args:
        config: the config's fields in Transformers' names.
        tensors: by Transformers' names; of a tied model, without the head. float32, float16,
            bfloat16 as its bits in uint16, or quantized.
        kind: what they are: "f32", "bf16", "f16", "int8" or "int4".
        digest: computes the digest of the weights in their files. A state belongs to these, in
            whichever kind they are used.
        check: looks whether the files are as long as they were, and raises a `CheckpointError`.
        remark: what was done to the weights that the user may not expect, in one line, or None.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    kind: str
    digest: Callable[[], str]
    check: Callable[[], None]
    remark: str | None = None

    @property
    def n_parameters(self) -> int:
        """How many numbers were trained. A head that is the embedding table counts once."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """The bytes that they take as they are used, which every decoded token reads."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def load_weights(checkpoint: Checkpoint, kind: str = "auto") -> Weights:
    """Map a checkpoint's weights, and convert what is not of the kind asked for.

    Args:
        checkpoint: what `open_checkpoint` returned.
        kind: one of `KINDS`. The quantized weights of a folder can be had as they are ("auto", or
            their own kind), or widened by "f32" and "bf16" to the numbers they stand for.

    Returns:
        The weights, checked against the config.

    Raises:
        ConfigError: there is no such kind, or it cannot be made of these weights.
        CheckpointError: the weights are pickled, of another program's quantization, or not those
            that the config asks for.

    Example:
        >>> from anymamba.assets import bundled_model
        >>> from anymamba.checkpoint import open_checkpoint
        >>> weights = load_weights(open_checkpoint(bundled_model()))
        >>> weights.kind, weights.tensors["backbone.norm_f.weight"].dtype
        ('bf16', dtype('uint16'))
    """
    check_kind(kind)
    if checkpoint.pickled:
        raise CheckpointError(
            f"the weights in {str(checkpoint.folder)!r} are pickled, which only PyTorch reads: "
            f"`anymamba convert {checkpoint.folder} DST` writes them as safetensors, once "
            "(it needs: pip install 'anymamba[torch]')"
        )
    bits = _check(checkpoint)
    files = FileMap()
    stored = {name: _array(files, record) for name, record in checkpoint.tensors.items()}
    tensors = _assembled(stored, expected_shapes(checkpoint.config))
    tensors = _without_repeated_head(checkpoint, tensors)

    def digest() -> str:
        records = checkpoint.tensors.items()
        return bytes_digest({n: (r.dtype, r.shape, files.bytes_of(r)) for n, r in records})

    own = f"int{bits}" if bits else dtype_of(cast(Any, tensors[EMBEDDINGS])).lower()
    if kind == "auto" or (bits and kind == own):
        return Weights(checkpoint.config, tensors, own, digest, files.check)
    return Weights(checkpoint.config, convert(tensors, kind), kind, digest, files.check)


def _check(checkpoint: Checkpoint) -> int | None:
    """Compare the tensors with the config; return in how many bits they are, if quantized."""
    where = repr(str(checkpoint.folder))
    found = {name: record.shape for name, record in checkpoint.tensors.items()}
    try:
        bits = quantized_bits(checkpoint.config)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error
    config = checkpoint.config
    expected = quantized_shapes(config, found) if bits else expected_shapes(config)
    check_tensors(found, expected, where)
    for name, record in checkpoint.tensors.items():
        if name.endswith("_q"):
            fitting: tuple[str, ...] = ("U8",)
        elif name.endswith(("_scales", "_minima")):
            fitting = ("BF16",)
        else:
            fitting = ("F32", "F16", "BF16")
        if record.dtype not in fitting:
            raise CheckpointError(
                f"{name} in {where} is stored as {record.dtype}, expected {' or '.join(fitting)}"
            )
    return bits


def _array(files: FileMap, record: TensorRecord) -> NDArray[Any]:
    """A tensor where it lies, in the file whose header was read, and not in a newer one."""
    if files.header(record.file).tensors.get(record.name) != record:
        raise CheckpointError(
            f"{str(record.file)!r} was replaced while it was opened; load the model again"
        )
    return files.array(record)


def _assembled(
    stored: Mapping[str, NDArray[Any]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The parts of each quantized matrix put together."""
    tensors: dict[str, Tensor] = {}
    for name, array in stored.items():
        if name.endswith("weight_q"):
            from anymamba.checkpoint.quantization import QuantizedArray

            whole = name.removesuffix("_q")
            n, k = shapes[whole]
            scales = stored[f"{whole}_scales"]
            tensors[whole] = QuantizedArray(
                q=array,
                scales=scales,
                minima=stored.get(f"{whole}_minima"),
                bits=8 if array.shape[1] == k else 4,
                group=k // scales.shape[1],
                shape=(n, k),
            )
        elif not name.endswith(("weight_scales", "weight_minima")):
            tensors[name] = array
    return tensors


def _without_repeated_head(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A tied model's head may be stored, if it is the embedding table; another would be lost."""
    if HEAD not in tensors or HEAD in expected_shapes(checkpoint.config):
        return tensors
    if not np.array_equal(cast(Any, tensors.pop(HEAD)), cast(Any, tensors[EMBEDDINGS])):
        raise CheckpointError(
            f"the config in {str(checkpoint.folder)!r} ties {HEAD} to {EMBEDDINGS}, but the two "
            "differ there; set tie_word_embeddings to false to use both"
        )
    return tensors
