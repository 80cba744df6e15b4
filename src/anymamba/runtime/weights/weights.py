"""A checkpoint's weights, checked against its config and ready for the native core.

What is stored in the type asked for is mapped from its file, not copied: loading it costs nothing,
and processes share it. The rest is converted (`weight_types`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from anymamba.checkpoint import Checkpoint
from anymamba.checkpoint.architecture import EMBEDDINGS
from anymamba.checkpoint.dtypes import dtype_of
from anymamba.checkpoint.quantized_folder import quantized_bits
from anymamba.checkpoint.source import open_tensors
from anymamba.errors import CheckpointError
from anymamba.renamed import warn_renamed
from anymamba.runtime.weights.weight_types import check_weight_type, to_weight_type

if TYPE_CHECKING:
    from anymamba.checkpoint.quantization import Tensor


@dataclass(frozen=True)
class Weights:
    """All tensors of a model.

    Args:
        config: the config's fields in Transformers' names.
        tensors: by Transformers' names; of a tied model, without the head. float32, float16,
            bfloat16 as its bits in uint16, or quantized.
        weight_type: what they are: "f32", "bf16", "f16", "int8" or "int4".
        digest: computes the digest of the weights in their files. A state belongs to these, in
            whichever type they are used.
        check: looks whether the files are as long as they were, and raises a `CheckpointError`.
        remark: what was done to the weights that the user may not expect, in one line, or None.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    weight_type: str
    digest: Callable[[], str]
    check: Callable[[], None]
    remark: str | None = None

    @property
    def kind(self) -> str:
        """The name of `weight_type` in release 0.1."""
        warn_renamed("Weights.kind", "Weights.weight_type")
        return self.weight_type

    @property
    def n_parameters(self) -> int:
        """How many numbers were trained. A head that is the embedding table counts once."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """The bytes that they take as they are used, which every decoded token reads."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def load_weights(checkpoint: Checkpoint, weight_type: str = "auto") -> Weights:
    """Map a checkpoint's weights, and convert what is not of the type asked for.

    Args:
        checkpoint: what `open_checkpoint` returned.
        weight_type: one of `WEIGHT_TYPES`. The quantized weights of a folder can be had as they are
            ("auto", or their own type), or widened by "f32" and "bf16" to the numbers they stand
            for.

    Returns:
        The weights, checked against the config.

    Raises:
        ConfigError: there is no such type, or it cannot be made of these weights.
        CheckpointError: the weights are pickled, of another program's quantization, or not those
            that the config asks for.

    Example:
        >>> from anymamba.assets import bundled_model
        >>> from anymamba.checkpoint import open_checkpoint
        >>> weights = load_weights(open_checkpoint(bundled_model()))
        >>> weights.weight_type, weights.tensors["backbone.norm_f.weight"].dtype
        ('bf16', dtype('uint16'))
    """
    check_weight_type(weight_type)
    if checkpoint.pickled:
        raise CheckpointError(
            f"the weights in {str(checkpoint.folder)!r} are pickled, which only PyTorch reads: "
            f"`anymamba convert {checkpoint.folder} DST` writes them as safetensors, once "
            "(it needs: pip install 'anymamba[torch]')"
        )
    stored = open_tensors(checkpoint)
    tensors = dict(stored)
    bits = quantized_bits(checkpoint.config)
    own = f"int{bits}" if bits else dtype_of(cast(Any, tensors[EMBEDDINGS])).lower()
    if weight_type != "auto" and not (bits and weight_type == own):
        tensors, own = to_weight_type(tensors, weight_type), weight_type
    return Weights(checkpoint.config, tensors, own, stored.digest, stored.check)
