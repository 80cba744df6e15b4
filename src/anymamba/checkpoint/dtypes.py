"""The types that tensors are stored in: one table, and arrays from one of them to another.

numpy has no bfloat16. An array of bfloat16 has the bits in uint16 here, and this module is the
one that says so: `dtype_of` names the type of an array, `as_float32` and `as_dtype` convert. A
bfloat16 is the upper half of a float32. Widening is exact; narrowing rounds to the nearest, and of
two equally near to the one whose last bit is zero, as the processors' instructions do.

Importing this module does not import numpy; its functions do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from anymamba.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from anymamba.checkpoint.quantization import Tensor


class DType(NamedTuple):
    """A type of numbers.

    Args:
        nbytes: how many bytes a number takes.
        torch: PyTorch's name, which configs have too.
        numpy: numpy's name of an array of it; None where it is never read.
    """

    nbytes: int
    torch: str
    numpy: str | None = None


DTYPES: Mapping[str, DType] = {
    "F64": DType(8, "float64", "<f8"),
    "F32": DType(4, "float32", "<f4"),
    "F16": DType(2, "float16", "<f2"),
    "BF16": DType(2, "bfloat16", "<u2"),
    "U8": DType(1, "uint8", "|u1"),
    "BOOL": DType(1, "bool"),
    "I8": DType(1, "int8"),
    "I16": DType(2, "int16"),
    "I32": DType(4, "int32"),
    "I64": DType(8, "int64"),
    "U16": DType(2, "uint16"),
    "U32": DType(4, "uint32"),
    "U64": DType(8, "uint64"),
    "F8_E4M3": DType(1, "float8_e4m3fn"),
    "F8_E5M2": DType(1, "float8_e5m2"),
    "F8_E8M0": DType(1, "float8_e8m0fnu"),
    "C64": DType(8, "complex64"),
}
"""The types by the names that safetensors and GGUF have for them. Types of less than a byte exist
too (F4, F6); no weights that this package reads use them."""

FLOATS = ("F32", "F16", "BF16", "F64")
"""The types that weights are stored in. Trained ones rarely have the last."""

LARGEST_FLOAT16 = 65504.0
"""Beyond this a number becomes infinite in float16."""


def check_fits_float16(name: str, values: NDArray[Any], type_name: str = "F16") -> None:
    """Refuse numbers that float16, or a type of blocks with scales in float16, cannot keep.

    Args:
        name: the tensor's.
        values: its numbers.
        type_name: the type that they are to have.

    Raises:
        ConfigError: one is too large.

    Example:
        >>> import numpy as np
        >>> check_fits_float16("backbone.norm_f.weight", np.float32([65504]))
    """
    if not (abs(values) <= LARGEST_FLOAT16).all():
        raise ConfigError(
            f"{name} holds numbers beyond float16's {LARGEST_FLOAT16:.0f}, which {type_name} "
            "cannot keep; take f32 or bf16 for the weights"
        )


_BY_NUMPY = {dtype.numpy: name for name, dtype in DTYPES.items() if dtype.numpy}
_BLOCK = 1 << 20  # numbers at a time, so that what lies between costs little memory


def dtype_of(array: NDArray[Any]) -> str:
    """The type of an array, by its name in `DTYPES`; of bits in uint16 it is bfloat16.

    Example:
        >>> import numpy as np
        >>> dtype_of(np.float32([1])), dtype_of(np.uint16([0x3F80]))
        ('F32', 'BF16')
    """
    return _BY_NUMPY[array.dtype.str]


def as_float32(tensor: Tensor, copy: bool = False) -> NDArray[np.float32]:
    """The numbers of a tensor in float32, whichever type it is stored in.

    Args:
        tensor: of one of `FLOATS`, or quantized.
        copy: whether a float32 array is copied too, rather than returned as it is.

    Returns:
        The numbers, in the same shape. Only those of float64 are rounded.

    Example:
        >>> import numpy as np
        >>> as_float32(np.uint16([0x3F80, 0xC000])), as_float32(np.float16([0.5]))
        (array([ 1., -2.], dtype=float32), array([0.5], dtype=float32))
    """
    import numpy as np

    if not isinstance(tensor, np.ndarray):
        from anymamba.checkpoint.quantization import dequantize

        return dequantize(tensor)
    return to_float32(tensor) if dtype_of(tensor) == "BF16" else tensor.astype("<f4", copy=copy)


def as_dtype(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """The numbers of an array in another type, both of `FLOATS`.

    Returns:
        The numbers, rounded to the nearest. An array of this type is returned as it is. What is too
        large becomes infinite.

    Example:
        >>> import numpy as np
        >>> as_dtype(np.float32([1, -2]), "BF16")
        array([16256, 49152], dtype=uint16)
    """
    import numpy as np

    if dtype_of(array) == dtype:
        return array
    wide = as_float32(array)
    with np.errstate(over="ignore"):
        return (
            to_bfloat16(wide) if dtype == "BF16" else wide.astype(DTYPES[dtype].numpy, copy=False)
        )


def to_bfloat16(values: NDArray[np.floating[Any]]) -> NDArray[np.uint16]:
    """Round float32 or float16 numbers to bfloat16, and return its bits in the same shape.

    What is too large becomes infinite, and NaN stays NaN.

    Example:
        >>> import numpy as np
        >>> [hex(bits) for bits in to_bfloat16(np.array([1.0, -2.0, np.inf], np.float32))]
        ['0x3f80', '0xc000', '0x7f80']
    """
    import numpy as np

    flat = np.ascontiguousarray(values).reshape(-1)
    narrow = np.empty(flat.shape, np.uint16)
    for start in range(0, flat.size, _BLOCK):
        part = flat[start : start + _BLOCK].astype(np.float32, copy=False)
        bits = part.view(np.uint32)
        last_kept = (bits >> 16) & 1
        rounded = (bits + (0x7FFF + last_kept)) >> 16
        # Rounding could carry a NaN over to infinity or to zero: set its quiet bit instead.
        narrow[start : start + _BLOCK] = np.where(np.isnan(part), bits >> 16 | 0x40, rounded)
    return narrow.reshape(values.shape)


def to_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Widen the bits of bfloat16 to float32, which is exact.

    Example:
        >>> import numpy as np
        >>> to_float32(np.array([0x3F80, 0xC000], np.uint16)).tolist()
        [1.0, -2.0]
    """
    import numpy as np

    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)
