"""The types of tensors in a GGUF file, and what their blocks stand for.

Plain types (F32, F16, BF16) hold numbers. The others cut a row into blocks of 32 to 256 weights,
each whole numbers of a few bits with scales of their own. Such a tensor can be had in two ways:

- `widened`: the float32 values that the blocks stand for. The `gguf` package computes them. Q6_K
  alone is decoded here: llama.cpp keeps the head of every "Q4_0" and "Q4_K" file in it, and these
  are the files that people download, so that they open without another package.
- `kept_blocks`: as a `QuantizedArray` in groups of 32, for the kernels. Q8_0 and Q4_0 have its
  form, and Q4_1 and Q4_K have it with an offset: each group of 32 has numbers of 4 bits, a scale
  and a minimum. The whole numbers stay. Scales and minima become bfloat16, which has 8 bits of a
  float16's 11. For Q8_0 and Q4_0 all weights of a block then move by the same share, at most 1/256,
  as they would if they were kept in bfloat16 themselves. To compute the whole numbers anew for the
  rounded scale would move most weights more: by up to half a step, where 1/256 of a weight in the
  middle of its block is a quarter of a step of Q8_0 and a 64th of a step of Q4_0.

    n  rows of a weight    k  columns    b  blocks of a row
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anymamba.checkpoint.dtypes import DTYPES, to_bfloat16
from anymamba.checkpoint.io import shown
from anymamba.checkpoint.quantization import QuantizedArray, pack, row_blocks
from anymamba.errors import CheckpointError, MissingDependencyError

if TYPE_CHECKING:
    from anymamba.checkpoint import TensorRecord


class BlockType(NamedTuple):
    """A type of tensors.

    Args:
        name: GGUF's name for it.
        numbers: how many numbers a block holds.
        bytes: how many bytes it takes.
    """

    name: str
    numbers: int
    bytes: int


TYPES = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    16: BlockType("IQ2_XXS", 256, 66),
    17: BlockType("IQ2_XS", 256, 74),
    18: BlockType("IQ3_XXS", 256, 98),
    19: BlockType("IQ1_S", 256, 50),
    20: BlockType("IQ4_NL", 32, 18),
    21: BlockType("IQ3_S", 256, 110),
    22: BlockType("IQ2_S", 256, 82),
    23: BlockType("IQ4_XS", 256, 136),
    29: BlockType("IQ1_M", 256, 56),
    30: BlockType("BF16", 1, 2),
    34: BlockType("TQ1_0", 256, 54),
    35: BlockType("TQ2_0", 256, 66),
    39: BlockType("MXFP4", 32, 17),
    40: BlockType("NVFP4", 64, 36),
}
"""The types that can be read, by their numbers in a file: those that the `gguf` package widens."""

OTHER_TYPES = {9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"} | {
    41: "Q1_0"
}
"""The others are known by name alone, to be refused by it."""

PLAIN = {name: DTYPES[name].numpy for name in ("F32", "F16", "BF16")}
"""Types without blocks, as numpy has them."""

KEPT = {"Q8_0": 8, "Q4_0": 4, "Q4_1": 4, "Q4_K": 4}
"""The types that `kept_blocks` takes, and the bits of their numbers."""

_GROUP = 32
# How far runs of numbers in 4 and in 2 bits lie up in their bytes.
_NIBBLES = np.array([[0], [4]], np.uint8)
_PAIRS = np.array([[0], [2], [4], [6]], np.uint8)
_BY_NAME = {found.name: found for found in TYPES.values()}


def widened(dtype: str, data: memoryview, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The values of a tensor in blocks, in float32. Memory holds them, and little beside them.

    Args:
        dtype: GGUF's name of its type, which has blocks.
        data: the tensor's bytes.
        shape: of its values, outermost first.

    Raises:
        MissingDependencyError: the `gguf` package computes them and is not installed, or is too old
            to know the type.

    Example:
        >>> block = np.zeros(210, np.uint8)  # Q6_K: numbers, upper bits, scales, float16
        >>> block[192:208], block[208:] = 1, np.float16([0.5]).view(np.uint8)
        >>> widened("Q6_K", memoryview(block), (1, 256))[0, :2]  # number 0 stands for -32
        array([-16., -16.], dtype=float32)
    """
    numbers, n_bytes = _BY_NAME[dtype][1:]
    k = shape[-1]
    rows_nb = np.frombuffer(data, np.uint8).reshape(-1, k // numbers * n_bytes)
    values_nk = np.empty((len(rows_nb), k), np.float32)
    decode = _values_of_q6_k if dtype == "Q6_K" else _decoder(dtype)
    with np.errstate(invalid="ignore", over="ignore"):  # scales may be NaN, as weights may
        for rows in row_blocks(*values_nk.shape):
            values_nk[rows] = decode(rows_nb[rows])
    return values_nk.reshape(shape)


def kept_blocks(record: TensorRecord, data: memoryview) -> QuantizedArray:
    """A matrix of a type in `KEPT`, of which `data` are the bytes, for the kernels.

    Returns:
        The whole numbers as they are, with scales, and minima if the type has them, in bfloat16.

    Raises:
        CheckpointError: it is no matrix, or holds a number that the kernels do not know.

    Example:
        >>> from pathlib import Path
        >>> from anymamba.checkpoint import TensorRecord
        >>> record = TensorRecord(Path("a.gguf"), "token_embd.weight", "Q4_0", (2, 32), 0, 36)
        >>> kept_blocks(record, memoryview(bytes(36))).bits
        4
    """
    if len(record.shape) != 2:
        raise CheckpointError(f"tensor {shown(record.name)} has {len(record.shape)} dimensions")
    n, k = record.shape
    blocks_nbx = np.frombuffer(data, np.uint8).reshape(n, -1, _BY_NAME[record.dtype].bytes)
    if record.dtype == "Q4_K":
        return _kept_q4_k(blocks_nbx, n, k)
    scales = _bfloat16(blocks_nbx[..., :2])
    if record.dtype == "Q8_0":
        return QuantizedArray(_unsigned(record, blocks_nbx), scales, None, 8, _GROUP, (n, k))
    # Number i of a block lies low in byte i, number i + 16 high in it: as ours do.
    minima = _bfloat16(blocks_nbx[..., 2:4]) if record.dtype == "Q4_1" else None
    q = np.ascontiguousarray(blocks_nbx[..., -16:]).reshape(n, k // 2)
    return QuantizedArray(q, scales, minima, 4, _GROUP, (n, k))


def import_gguf(purpose: str = "this") -> Any:
    """Import the `gguf` package, which is needed for a purpose.

    Raises:
        MissingDependencyError: it is not installed.

    Example:
        >>> import_gguf().__name__
        'gguf'
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingDependencyError(
            f"{purpose} needs the gguf package, which is not installed: pip install "
            "'anymamba[gguf]'"
        ) from error
    return gguf


def _decoder(dtype: str) -> Any:
    gguf = import_gguf(f"reading tensors of type {dtype} as float32")
    number = getattr(gguf.GGMLQuantizationType, dtype, None)

    def decode(rows_nb: NDArray[np.uint8]) -> NDArray[np.float32]:
        try:
            values: NDArray[np.float32] = gguf.dequantize(rows_nb, number)
        except NotImplementedError as error:
            raise MissingDependencyError(
                f"the gguf package that is installed does not read {dtype}; a newer one does: "
                "pip install --upgrade gguf"
            ) from error
        return values

    return decode


def _values_of_q6_k(rows_nb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Blocks of 256: the lower 4 bits, the upper 2, a scale of 8 bits for each 16, and one of all.

    Each half of a block is four runs of 32 numbers. The lower bits of runs 0 and 1 lie low in 64
    bytes, those of runs 2 and 3 high in the same; the upper bits of run i are bits 2 i and 2 i + 1
    of 32 bytes more.
    """
    blocks = rows_nb.reshape(-1, 210)
    low = blocks[:, :128].reshape(-1, 2, 1, 64) >> _NIBBLES
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> _PAIRS
    q = (low & 15).reshape(-1, 2, 4, 32) | (high & 3) << 4
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    scales *= np.ascontiguousarray(blocks[:, 208:]).view("<f2").astype(np.float32)
    values: NDArray[np.float32] = (q.reshape(-1, 16, 16).astype(np.float32) - 32) * scales[
        :, :, None
    ]
    return values.reshape(len(rows_nb), -1)


def _kept_q4_k(blocks_nbx: NDArray[np.uint8], n: int, k: int) -> QuantizedArray:
    """Blocks of 256: a scale of the scales, one of the minima, 8 of each in 6 bits, the numbers."""
    packed = blocks_nbx[..., 4:16].reshape(n, -1, 3, 4)
    first, second, mixed = packed[:, :, 0], packed[:, :, 1], packed[:, :, 2]
    # Of the groups 0 to 3 in 6 bits of a byte; of 4 to 7 in half a byte and 2 bits above the 6.
    scales = np.concatenate([first & 63, (mixed & 15) | (first >> 6 << 4)], axis=-1)
    minima = np.concatenate([second & 63, (mixed >> 4) | (second >> 6 << 4)], axis=-1)
    # Bytes 0 to 31 hold group 0 low and group 1 high; ours hold the halves of one group.
    numbers: NDArray[np.uint8] = blocks_nbx[..., 16:].reshape(n, -1, 1, 32) >> _NIBBLES
    numbers &= 15
    with np.errstate(invalid="ignore", over="ignore"):
        scale = scales * _float32(blocks_nbx[..., :2])[..., None]
        minimum = minima * -_float32(blocks_nbx[..., 2:4])[..., None]
    return QuantizedArray(
        pack(numbers.reshape(n, -1, _GROUP), 4),
        to_bfloat16(scale.reshape(n, -1)),
        to_bfloat16(minimum.reshape(n, -1)),
        4,
        _GROUP,
        (n, k),
    )


def _unsigned(record: TensorRecord, blocks_nbx: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The numbers of Q8_0, from signed to unsigned with zero at 128."""
    q = (blocks_nbx[..., 2:] ^ np.uint8(0x80)).reshape(len(blocks_nbx), -1)
    if not q.all():
        raise CheckpointError(
            f"tensor {shown(record.name)} in {str(record.file)!r} holds the number -128, which no "
            "writer of Q8_0 makes and the kernels do not know; load it with weights='f32' "
            "(on the command line --weights f32)"
        )
    return q


def _float32(bytes_nb2: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Float16 numbers that lie in the last two bytes: (n, b, 2) to (n, b)."""
    return np.ascontiguousarray(bytes_nb2).view("<f2")[..., 0].astype(np.float32)


def _bfloat16(bytes_nb2: NDArray[np.uint8]) -> NDArray[np.uint16]:
    return to_bfloat16(_float32(bytes_nb2))
