"""The tensors of safetensors files as numpy arrays that are the files' own bytes, mapped.

Nothing is read before it is used, and processes that map one file share its memory. The arrays
cannot be written to. A file that is replaced, as all of ours are, stays what it was for those who
mapped it before. One that is shortened in place does not: the system ends a process that touches
what is gone. So its size is looked at again before it is touched, which leaves only the moments in
between.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anymamba.checkpoint import SafetensorsHeader, TensorRecord
from anymamba.checkpoint.dtypes import DTYPES, FLOATS
from anymamba.checkpoint.io import shown
from anymamba.checkpoint.safetensors import header_of
from anymamba.errors import CheckpointError

__all__ = ["TYPES", "FileMap", "check_whole"]

TYPES = {name: DTYPES[name].numpy for name in (*FLOATS, "U8")}
"""numpy's types by safetensors' names, of all that weights are stored in."""


class FileMap:
    """Files that are opened once each.

    Example:
        >>> import tempfile
        >>> from anymamba.checkpoint import read_header
        >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> header = b'{"D": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
        >>> _ = file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
        >>> FileMap().array(read_header(file).tensors["D"])
        array([0., 0.], dtype=float32)
    """

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}
        self._headers: dict[Path, SafetensorsHeader] = {}

    def header(self, path: Path) -> SafetensorsHeader:
        """The header of the very file whose bytes are given out, whatever became of its name.

        Raises:
            CheckpointError: the file cannot be read, or is no safetensors file.
        """
        if path not in self._headers:
            whole = self._mapped(path)
            check_whole(path, whole)
            whole.seek(0)
            self._headers[path] = header_of(path, whole, len(whole))
        return self._headers[path]

    def bytes_of(self, record: TensorRecord) -> memoryview:
        """A tensor's bytes, where they lie.

        Raises:
            CheckpointError: the file cannot be read, or has become shorter than its header said.
        """
        whole = self._mapped(record.file)
        check_whole(record.file, whole, record.end)
        return memoryview(whole)[record.begin : record.end]

    def check(self) -> None:
        """Look whether all files still are as long as they were.

        Raises:
            CheckpointError: one is not, and to touch its arrays might end the process.
        """
        for path, whole in self._maps.items():
            check_whole(path, whole)

    def _mapped(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            self._maps[path] = _map(path)
        return self._maps[path]

    def array(self, record: TensorRecord) -> NDArray[Any]:
        """A tensor, where it lies, or a copy where numbers straddle the addresses of their type.

        Raises:
            CheckpointError: the tensor has another type than `TYPES` lists.
        """
        if record.dtype not in TYPES:
            raise CheckpointError(
                f"tensor {shown(record.name)} in {str(record.file)!r} is stored as {record.dtype}, "
                f"expected one of {', '.join(TYPES)}; store it in one of these"
            )
        array = np.frombuffer(self.bytes_of(record), dtype=TYPES[record.dtype])
        if not array.flags.aligned:
            array = array.copy()
            array.flags.writeable = False
        return array.reshape(record.shape)


def check_whole(path: Path, whole: mmap.mmap, needed: int = 0) -> None:
    """Refuse a file that was shortened since it was mapped, or that ends too early.

    Args:
        path: what it is called.
        whole: the file, mapped.
        needed: how many bytes it must have.

    Raises:
        CheckpointError: it has become shorter.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryFile() as file:
        ...     _ = file.write(bytes(10)), file.flush()
        ...     check_whole(Path("x"), mmap.mmap(file.fileno(), 0), needed=11)
        Traceback (most recent call last):
            ...
        anymamba.errors.CheckpointError: 'x' became shorter while it was in use; fetch or write it \
again, and load it anew
    """
    if whole.size() < len(whole) or needed > len(whole):
        raise CheckpointError(
            f"{str(path)!r} became shorter while it was in use; fetch or write it again, and load "
            "it anew"
        )


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: the file is empty
        raise CheckpointError(f"cannot read {str(path)!r}: {error}") from error
