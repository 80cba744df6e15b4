"""The header of a safetensors file, read and checked without torch or numpy.

A file is an 8-byte little-endian length, a JSON object of that length, and the tensors' bytes.
The object gives each tensor's dtype, shape, and where in the bytes it begins and ends. Whoever
maps those bytes trusts these numbers, so nothing here is taken on faith: every tensor takes
exactly the bytes that its shape asks for, and together they fill the file without gap or overlap.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from anymamba.checkpoint.dtypes import DTYPES
from anymamba.checkpoint.io import MAX_JSON_BYTES, listed, parse_json_object, shown
from anymamba.errors import CheckpointError

if TYPE_CHECKING:
    from mmap import mmap

_LENGTH_BYTES = 8
_METADATA = "__metadata__"


@dataclass(frozen=True)
class TensorRecord:
    """Where a tensor's bytes are.

    Args:
        file: the file that holds them.
        name: the tensor's name in that file.
        dtype: safetensors' name of its type, as "F32" or "BF16".
        shape: its dimensions, outermost first.
        begin: offset of its first byte from the start of the file. It may be unaligned.
        end: offset after its last byte.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """What a safetensors file says about itself, checked.

    Args:
        file: the file.
        tensors: where each tensor is, by its name in the file.
        metadata: the file's free text fields.
    """

    file: Path
    tensors: dict[str, TensorRecord]
    metadata: dict[str, str]


def read_header(path: str | os.PathLike[str]) -> SafetensorsHeader:
    """Read and check the header of a safetensors file. The tensors are not read.

    Args:
        path: the file.

    Returns:
        Its tensors' places and its metadata. For each tensor, the bytes from `begin` to `end`
        are inside the file, belong to no other tensor, and are as many as its shape asks for.

    Raises:
        CheckpointError: the file is missing, truncated or broken; the message names the file
            and the defect.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> header = b'{"D": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
        >>> _ = file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
        >>> read_header(file).tensors["D"].shape
        (2,)
    """
    file = Path(path)
    # Opening a named pipe would wait for ever.
    if not file.is_file():
        raise CheckpointError(f"{str(file)!r} is missing or is not a file")
    try:
        with file.open("rb") as stream:
            return header_of(file, stream, os.fstat(stream.fileno()).st_size)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot read {str(file)!r}: {error.strerror}") from error


def header_of(file: Path, stream: BinaryIO | mmap, size: int) -> SafetensorsHeader:
    """Read and check the header of a file that is open, as `read_header` does.

    The stream is at the beginning, and has `size` bytes.

    Raises:
        CheckpointError: the file is truncated or broken.

    Example:
        >>> from io import BytesIO
        >>> header_of(Path("empty"), BytesIO(bytes([2, 0, 0, 0, 0, 0, 0, 0]) + b"{}"), 10).tensors
        {}
    """
    text = _text(file, stream, size)
    where = f"the header of {str(file)!r}"
    fields = parse_json_object(text, where)
    metadata = _metadata(fields.pop(_METADATA, {}), where)
    start = _LENGTH_BYTES + len(text)
    tensors = {name: _record(file, name, entry, start) for name, entry in fields.items()}
    _check_layout(tensors.values(), start, size, file)
    return SafetensorsHeader(file, tensors, metadata)


def _text(file: Path, stream: BinaryIO | mmap, size: int) -> bytes:
    """The header's JSON text."""
    length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
    if size < _LENGTH_BYTES:
        _truncated(file, size, "its first 8 bytes")
    if length > MAX_JSON_BYTES:
        _broken(
            file,
            f"its header claims {length} bytes, at most {MAX_JSON_BYTES} are allowed; "
            "it may not be a safetensors file at all",
        )
    text = stream.read(length)
    if len(text) < length:
        _truncated(file, size, f"its header of {length} bytes")
    return text


def _metadata(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise CheckpointError(
            f"{where} is broken: {_METADATA} must map names to text, got {shown(value)}"
        )
    return value


def _record(file: Path, name: str, entry: Any, start: int) -> TensorRecord:
    """Check one tensor's entry by itself."""
    tensor = f"tensor {shown(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _broken(file, f"{tensor} needs exactly dtype, shape and data_offsets, got {shown(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        _broken(file, f"{tensor} has dtype {shown(dtype)}, known are {', '.join(DTYPES)}")
    if not _are_counts(shape):
        _broken(file, f"{tensor} has shape {shown(shape)}, expected whole numbers from 0 to 2^63")
    if not _are_counts(offsets) or len(offsets) != 2:
        _broken(file, f"{tensor} has data_offsets {shown(offsets)}, expected its begin and end")
    begin, end = offsets
    needed = math.prod(shape) * DTYPES[dtype].nbytes
    if end - begin != needed:
        _broken(
            file,
            f"{tensor} of shape {shown(shape)} and dtype {dtype} needs {shown(needed)} bytes, "
            f"its data_offsets {shown(offsets)} span {end - begin}",
        )
    return TensorRecord(file, name, dtype, tuple(shape), start + begin, start + end)


def _are_counts(value: Any) -> bool:
    # JSON's true and false are ints to Python.
    return (
        isinstance(value, list)
        and len(value) <= 16
        and all(type(number) is int and 0 <= number < 2**63 for number in value)
    )


def _check_layout(records: Iterable[TensorRecord], start: int, size: int, file: Path) -> None:
    """Check that the tensors, taken together, fill the file exactly."""
    reached, before = start, "the header"
    for record in sorted(records, key=lambda record: (record.begin, record.end)):
        name = shown(record.name)
        if record.begin < reached:
            _broken(file, f"tensor {name} overlaps {before} by {reached - record.begin} bytes")
        if record.begin > reached:
            _broken(file, f"{record.begin - reached} bytes lie unused before tensor {name}")
        reached, before = record.end, f"tensor {name}"
    if size < reached:
        cut = [shown(record.name) for record in records if record.end > size]
        _truncated(file, size, f"{reached} bytes with {listed(cut)}")
    if size > reached:
        _broken(file, f"{size - reached} bytes lie unused after its last tensor")


def _broken(file: Path, defect: str) -> NoReturn:
    raise CheckpointError(f"{str(file)!r} is broken: {defect}")


def _truncated(file: Path, size: int, needed: str) -> NoReturn:
    raise CheckpointError(
        f"{str(file)!r} is truncated: it has {size} bytes and would need {needed}; "
        "fetch or write it again"
    )
