"""Reading a model that is split into several GGUF files, as `llama-gguf-split` does it.

A part is named `model-00001-of-00003.gguf`, and its header says the same in `split.no` and
`split.count`. The first has the model's values; the tensors are spread over all.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from anymamba.checkpoint import TensorRecord
from anymamba.checkpoint.gguf.files import PART
from anymamba.checkpoint.gguf.header import GgufHeader, read_gguf_header
from anymamba.checkpoint.io import listed, shown
from anymamba.errors import CheckpointError


def read_gguf_files(path: str | os.PathLike[str]) -> GgufHeader:
    """Read and check the header of a GGUF file, and of all parts where it is one of several.

    Of parts, the values are those of the first and the tensors those of all. They are not read.

    Raises:
        CheckpointError: as `read_gguf_header`; or a part is missing, or does not belong to the
            others.

    Example:
        >>> import struct, tempfile
        >>> file = Path(tempfile.mkdtemp()) / "empty.gguf"
        >>> _ = file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
        >>> read_gguf_files(file).tensors
        {}
    """
    header = read_gguf_header(path)
    count = header.metadata.get("split.count", 0)
    if count in (0, 1):  # 0 is left behind where parts were put together
        return header
    files = _parts(header.file, count)
    headers = [header if file == header.file else read_gguf_header(file) for file in files]
    for number, part in enumerate(headers):
        found = part.metadata.get("split.no"), part.metadata.get("split.count")
        if found != (number, count):
            raise CheckpointError(
                f"{str(part.file)!r} says that it is part {shown(found[0])} (the first is 0) of "
                f"{shown(found[1])}, expected {number} of {count}; fetch the model again"
            )
    first = headers[0]
    tensors = _together(headers)
    total = first.metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise CheckpointError(
            f"{str(first.file)!r} says that all parts hold {shown(total)} tensors, and they hold "
            f"{len(tensors)}; fetch the model again"
        )
    data = {file: part.data[file] for file, part in zip(files, headers, strict=True)}
    return GgufHeader(first.file, first.metadata, tensors, data)


def _parts(file: Path, count: object) -> list[Path]:
    name = PART.fullmatch(file.name)
    if name is None or type(count) is not int or int(name[3]) != count:
        raise CheckpointError(
            f"{str(file)!r} is one of {shown(count)} parts of a model, and its name does not tell "
            "the others': expected one as in model-00001-of-00003.gguf"
        )
    files = [
        file.with_name(f"{name[1]}-{number:05}-of-{count:05}{name[4]}")
        for number in range(1, count + 1)
    ]
    missing = [shown(part.name) for part in files if not part.is_file()]
    if missing:
        raise CheckpointError(
            f"{str(file)!r} is one of {count} parts of a model, and beside it "
            f"{'is' if len(missing) == 1 else 'are'} missing {listed(missing)}; fetch them too"
        )
    return files


def _together(headers: Iterable[GgufHeader]) -> dict[str, TensorRecord]:
    tensors: dict[str, TensorRecord] = {}
    for header in headers:
        twice = tensors.keys() & header.tensors.keys()
        if twice:
            raise CheckpointError(
                f"{str(header.file)!r} is broken: tensor {shown(min(twice))} is in an earlier part "
                "too"
            )
        tensors |= header.tensors
    return tensors
