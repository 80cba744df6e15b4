"""The header of a GGUF file, read and checked before anything else looks at the file.

A file is the letters GGUF, a version, two counts, that many named values and that many tensors'
names, shapes, types and places; then, aligned, the tensors' bytes. Readers that follow these
numbers without a check read whatever lies behind them, so nothing here is taken on faith: all
of the header is inside the file, and every tensor's bytes are inside it and belong to no other.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from anymamba.checkpoint import TensorRecord
from anymamba.checkpoint.gguf.blocks import OTHER_TYPES, TYPES
from anymamba.checkpoint.io import listed, shown
from anymamba.errors import CheckpointError

MAX_HEADER_BYTES = 32 << 20
"""The vocabulary is in the header: 1.8 MB for the 50,000 tokens of the published Mambas."""

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MOST_ALIGNMENT = 1 << 16
_MOST_DIMENSIONS = 4

# Types of values, by their numbers, and how struct calls them.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_NUMBERS[12] = "d"
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says about itself, checked.

    Args:
        file: the file.
        metadata: its named values: numbers, booleans, texts, lists of texts, tuples of
            numbers.
        tensors: where each tensor is, by its name in the file. A shape is outermost first, and
            a dtype is GGUF's name, one of `blocks.TYPES`.
        data: by the file, its bytes, mapped. It was opened once: what the header says is true of
            these bytes, also when another file takes its place.
    """

    file: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorRecord]
    data: Mapping[Path, memoryview]


def read_gguf_header(path: str | os.PathLike[str]) -> GgufHeader:
    """Read and check the header of a GGUF file. The tensors are not read.

    Returns:
        Its values and its tensors' places. For each tensor, the bytes from `begin` to `end` are
        inside the file, belong to no other tensor, and are as many as its shape and type ask for.

    Raises:
        CheckpointError: the file is missing, truncated, broken, or holds tensors of a type that
            cannot be read; the message names file and defect.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "empty.gguf"
        >>> _ = file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
        >>> read_gguf_header(file).tensors
        {}
    """
    file = Path(path)
    data = _map(file)
    size = len(data)
    cursor = _Cursor(file, data)
    if bytes(cursor.take(4)) != _MAGIC:
        _broken(file, "it does not begin with GGUF; it may not be a GGUF file at all")
    version = cursor.number("I")
    if version not in _VERSIONS:
        turned = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
        kind = "big-endian" if turned else f"version {version}"
        remedy = "the gguf package's `gguf-convert-endian FILE little` turns it round"
        raise CheckpointError(
            f"{str(file)!r} is a {kind} GGUF file, expected version 2 or 3, little-endian; "
            + (remedy if turned else "convert the model anew")
        )
    n_tensors, n_values = cursor.number("Q"), cursor.number("Q")
    metadata = _metadata(cursor, n_values)
    alignment = _alignment(file, metadata)
    entries = [_entry(cursor) for _ in range(n_tensors)]
    start = cursor.place + -cursor.place % alignment
    _refuse_other_types(file, entries)
    records = [_record(file, entry, start, alignment) for entry in entries]
    _check_places(file, records, size)
    tensors = {record.name: record for record in records}
    if len(tensors) < len(records):
        _broken(file, "two of its tensors have one name")
    return GgufHeader(file, metadata, tensors, {file: data})


@dataclass(frozen=True)
class _Entry:
    """A tensor as the header lists it."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


class _Cursor:
    """Takes bytes from the front of a header, and never more than there are."""

    def __init__(self, file: Path, data: memoryview) -> None:
        self.file, self.place = file, 0
        self._text, self._size = data[:MAX_HEADER_BYTES], len(data)

    def take(self, count: int) -> memoryview:
        end = self.place + count
        if end > len(self._text):
            if end > self._size:
                raise CheckpointError(
                    f"{str(self.file)!r} is truncated: it has {self._size} bytes, and its header "
                    f"asks for {shown(end)}; fetch or write it again"
                )
            _broken(self.file, f"its header takes more than the {MAX_HEADER_BYTES} bytes allowed")
        piece = self._text[self.place : end]
        self.place = end
        return piece

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        piece = self.take(self.number("Q"))
        try:
            return str(piece, "utf-8")
        except UnicodeDecodeError:
            _broken(self.file, f"the text {shown(bytes(piece[:40]))} in its header is not UTF-8")

    def value(self) -> Any:
        kind = self.number("I")
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        return self.number(self._code(kind))

    def _array(self) -> Any:
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        code = self._code(kind)
        piece = self.take(count * struct.calcsize("<" + code))
        return struct.unpack(f"<{count}{code}", piece)

    def _code(self, kind: int) -> str:
        if kind not in _NUMBERS:
            _broken(self.file, f"a value in its header has the unknown type {kind}")
        return _NUMBERS[kind]


def _map(file: Path) -> memoryview:
    # Opening a named pipe would wait for ever.
    if not file.is_file():
        raise CheckpointError(f"{str(file)!r} is missing or is not a file")
    try:
        with file.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size == 0:  # which cannot be mapped
                return memoryview(b"")
            return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise CheckpointError(f"cannot read {str(file)!r}: {error.strerror}") from error


def _metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        name = cursor.string()
        if name in metadata:
            _broken(cursor.file, f"the value {shown(name)} stands twice in its header")
        metadata[name] = cursor.value()
    return metadata


def _alignment(file: Path, metadata: dict[str, Any]) -> int:
    value = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(value) is not int or not 1 <= value <= _MOST_ALIGNMENT or value & (value - 1):
        _broken(
            file,
            f"general.alignment is {shown(value)}, expected a power of two up to {_MOST_ALIGNMENT}",
        )
    return value


def _entry(cursor: _Cursor) -> _Entry:
    name = cursor.string()
    n_dimensions = cursor.number("I")
    if not 1 <= n_dimensions <= _MOST_DIMENSIONS:
        _broken(
            cursor.file,
            f"tensor {shown(name)} has {n_dimensions} dimensions, expected 1 to {_MOST_DIMENSIONS}",
        )
    innermost_first = [cursor.number("Q") for _ in range(n_dimensions)]
    if 0 in innermost_first:
        _broken(cursor.file, f"tensor {shown(name)} has a dimension of length 0")
    kind, offset = cursor.number("I"), cursor.number("Q")
    return _Entry(name, tuple(reversed(innermost_first)), kind, offset)


def _refuse_other_types(file: Path, entries: Iterable[_Entry]) -> None:
    others = sorted({entry.kind for entry in entries} - TYPES.keys())
    if others:
        names = listed(OTHER_TYPES.get(kind, f"of unknown number {kind}") for kind in others)
        known = ", ".join(found.name for found in TYPES.values())
        raise CheckpointError(
            f"{str(file)!r} holds tensors of type {names}; AnyMamba reads {known}: get or write "
            "the model in one of these"
        )


def _record(file: Path, entry: _Entry, start: int, alignment: int) -> TensorRecord:
    dtype, in_block, block_bytes = TYPES[entry.kind]
    name = shown(entry.name)
    if entry.shape[-1] % in_block:
        _broken(
            file,
            f"tensor {name} has rows of {entry.shape[-1]}, which blocks of {dtype} ({in_block}) "
            "do not divide",
        )
    if entry.offset % alignment:
        _broken(file, f"tensor {name} begins at {entry.offset}, no multiple of {alignment}")
    begin = start + entry.offset
    end = begin + math.prod(entry.shape) // in_block * block_bytes
    return TensorRecord(file, entry.name, dtype, entry.shape, begin, end)


def _check_places(file: Path, records: Iterable[TensorRecord], size: int) -> None:
    reached, before = 0, ""
    for record in sorted(records, key=lambda record: (record.begin, record.end)):
        if record.begin < reached:
            _broken(file, f"tensor {shown(record.name)} overlaps tensor {before}")
        if record.end > size:
            raise CheckpointError(
                f"{str(file)!r} is truncated: it has {size} bytes, and tensor "
                f"{shown(record.name)} would need {shown(record.end)}; fetch or write it again"
            )
        reached, before = record.end, shown(record.name)


def _broken(file: Path, defect: str) -> NoReturn:
    raise CheckpointError(f"{str(file)!r} is broken: {defect}")
