"""In which storage a model's weights are used.

The matrices are brought into the storage that is asked for. The rest (norms, convolutions, A, D,
biases) stays as it is, or becomes float32. `anymamba.checkpoint.architecture` says which is which.

| type | large matrices | small matrices | the rest |
| --- | --- | --- | --- |
| auto | as stored | as stored | as stored |
| f32 | float32 | float32 | float32 |
| bf16 | bfloat16 | bfloat16 | as stored |
| int8, int4 | that many bits, in groups of 128 | bfloat16 | float32 |

A matrix whose rows are no multiple of the group becomes bfloat16 where it would be quantized.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from anymamba.checkpoint.architecture import is_matrix
from anymamba.checkpoint.dtypes import as_dtype, as_float32
from anymamba.checkpoint.quantized_folder import BITS, is_quantized
from anymamba.errors import ConfigError
from anymamba.renamed import old_names

if TYPE_CHECKING:
    from anymamba.checkpoint.quantization import Tensor

__getattr__ = old_names(__name__)

WEIGHT_TYPES = ("auto", "f32", "bf16", "int8", "int4")
"""What may be asked for."""


def check_weight_type(weight_type: str) -> None:
    """Refuse a type that does not exist.

    Raises:
        ConfigError: it is none of `WEIGHT_TYPES`.

    Example:
        >>> check_weight_type("int8")
    """
    if weight_type not in WEIGHT_TYPES:
        raise ConfigError(f"weights must be one of {', '.join(WEIGHT_TYPES)}, got {weight_type!r}")


def to_weight_type(
    tensors: Mapping[str, Tensor], weight_type: str, group: int = 128
) -> dict[str, Tensor]:
    """Bring a model's tensors into another storage.

    Args:
        tensors: by Transformers' names. They are asked for one after the other.
        weight_type: "f32", "bf16", "int8" or "int4".
        group: how many weights share a scale, where they are quantized.

    Returns:
        The tensors; those that already are what is asked for are the same arrays.

    Raises:
        ConfigError: quantized weights were to be quantized in other bits.

    Example:
        >>> to_weight_type({"backbone.norm_f.weight": np.ones(2, np.float16)}, "int8")
        {'backbone.norm_f.weight': array([1., 1.], dtype=float32)}
    """
    return {name: _converted(name, tensor, weight_type, group) for name, tensor in tensors.items()}


def bytes_of(name: str, shape: tuple[int, ...], weight_type: str, group: int = 128) -> int:
    """How many bytes a float32 tensor takes once it is converted.

    Args:
        name: Transformers' name.
        shape: of its values.
        weight_type, group: as for `to_weight_type`.

    Example:
        >>> bytes_of("lm_head.weight", (2, 128), "int4")  # 256 numbers, and 2 scales in bfloat16
        132
    """
    count = math.prod(shape)
    if weight_type == "f32" or not is_matrix(name):
        return 4 * count
    if weight_type == "bf16" or not is_quantized(name, shape, group):
        return 2 * count
    return count * BITS[weight_type] // 8 + count // group * 2


def _converted(name: str, tensor: Tensor, weight_type: str, group: int) -> Tensor:
    if isinstance(tensor, np.ndarray):
        values = tensor
    elif weight_type not in BITS:
        values = as_float32(tensor)
    elif tensor.bits == BITS[weight_type]:
        return tensor
    else:
        raise ConfigError(
            f"the weights are int{tensor.bits} already and cannot be made {weight_type}, which "
            "would round them twice; use weights='auto' (on the command line --weights auto), or "
            "quantize the model as it was before"
        )
    if weight_type == "f32":
        return as_float32(values)
    if weight_type == "bf16":
        return as_dtype(values, "BF16") if is_matrix(name) else values
    if is_quantized(name, values.shape, group):
        from anymamba.checkpoint.quantization import quantize

        return quantize(as_float32(values), BITS[weight_type], group, name=name)
    return as_dtype(values, "BF16") if is_matrix(name) else as_float32(values)
