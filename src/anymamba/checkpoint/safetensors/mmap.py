"""The tensors of safetensors files as numpy arrays that are the files' own bytes, mapped.

Nothing is read before it is used, and processes that map one file share its memory. The arrays
cannot be written to. A file that is replaced, as all of ours are, stays what it was for those who
mapped it before. One that is shortened in place does not: the system ends a process that touches
what is gone. So its size is looked at again before it is touched, which leaves only the moments in
between.
"""

from __future__ import annotations

import mmap
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anymamba.checkpoint import SafetensorsHeader, TensorRecord, bytes_digest
from anymamba.checkpoint.dtypes import DTYPES, FLOATS
from anymamba.checkpoint.io import shown
from anymamba.checkpoint.quantization import Bits, QuantizedArray, Tensor
from anymamba.checkpoint.quantized_folder import PARTS
from anymamba.checkpoint.safetensors import header_of
from anymamba.errors import CheckpointError

TYPES = {name: DTYPES[name].numpy for name in (*FLOATS, "U8")}
"""numpy's types by safetensors' names, of all that weights are stored in."""


class FileMap:
    """Files that are opened once each.

    Args:
        private: whether the arrays can be written to: what is written is a copy, of this process
            alone, and not the file.

    Example:
        >>> import tempfile
        >>> from anymamba.checkpoint import read_header
        >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> header = b'{"D": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
        >>> _ = file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
        >>> FileMap().array(read_header(file).tensors["D"])
        array([0., 0.], dtype=float32)
    """

    def __init__(self, private: bool = False) -> None:
        self._access = mmap.ACCESS_COPY if private else mmap.ACCESS_READ
        self._maps: dict[Path, mmap.mmap] = {}
        self._headers: dict[Path, SafetensorsHeader] = {}

    def close(self) -> None:
        """Let go of the files, but for those that arrays or views still lie in.

        Windows neither replaces nor removes a file that is mapped.
        """
        for whole in self._maps.values():
            with suppress(BufferError):
                whole.close()
        self._maps.clear()

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
            self._maps[path] = _map(path, self._access)
        return self._maps[path]

    def current(self, record: TensorRecord) -> TensorRecord:
        """A tensor's place, if the file that is mapped is the one whose header named it.

        Raises:
            CheckpointError: another file took its place in the meantime.
        """
        if self.header(record.file).tensors.get(record.name) != record:
            raise CheckpointError(
                f"{str(record.file)!r} was replaced while it was opened; load the model again"
            )
        return record

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


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a model's files by Transformers' names, each made when it is asked for.

    Values are arrays of a type in `anymamba.checkpoint.dtypes`, or quantized. Nothing is kept:
    asking twice reads twice.

    Args:
        records: where the tensors are, with their types and shapes, by Transformers' names.
    """

    def __init__(self, records: Mapping[str, TensorRecord]) -> None:
        self.records = dict(records)

    def __iter__(self) -> Iterator[str]:
        return iter(self.records)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return any(name == own for own in self)  # Mapping's own would make the tensor

    @abstractmethod
    def bytes_of(self, name: str) -> memoryview:
        """The bytes of one of `records` as its file holds them.

        Raises:
            CheckpointError: the file has become shorter.
        """

    @abstractmethod
    def check(self) -> None:
        """Look whether the files still are as long as they were.

        Raises:
            CheckpointError: one is not, and to touch its tensors might end the process.
        """

    def digest(self) -> str:
        """The digest of the weights as they are stored, see `bytes_digest`."""
        records = self.records.items()
        return bytes_digest({n: (r.dtype, r.shape, self.bytes_of(n)) for n, r in records})


class MappedTensors(StoredTensors):
    """The tensors of safetensors files, where they lie; the parts of a quantized one together.

    Args:
        records: as `open_checkpoint` located them.
        shapes: the shapes of the model's tensors, those of a quantized one as a whole.

    Raises:
        CheckpointError: when a tensor is asked for whose file was replaced or shortened.

    Example:
        >>> from anymamba.assets import bundled_model
        >>> from anymamba.checkpoint import expected_shapes, open_checkpoint
        >>> opened = open_checkpoint(bundled_model())
        >>> tensors = MappedTensors(opened.tensors, expected_shapes(opened.config))
        >>> tensors["backbone.norm_f.weight"].shape
        (256,)
    """

    def __init__(
        self, records: Mapping[str, TensorRecord], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        super().__init__(records)
        self._shapes, self._files = shapes, FileMap()

    def __iter__(self) -> Iterator[str]:
        for name in self.records:
            if not name.endswith(PARTS):
                yield name
            elif name.endswith(PARTS[0]):
                yield name.removesuffix(PARTS[0])

    def __getitem__(self, name: str) -> Tensor:
        if name in self.records:
            return self._array(name)
        n, k = self._shapes[name]
        q, scales = self._array(name + PARTS[0]), self._array(name + PARTS[1])
        minima = self._array(name + PARTS[2]) if name + PARTS[2] in self.records else None
        bits: Bits = 8 if q.shape[1] == k else 4
        return QuantizedArray(q, scales, minima, bits, k // scales.shape[1], (n, k))

    def _array(self, name: str) -> NDArray[Any]:
        return self._files.array(self._files.current(self.records[name]))

    def bytes_of(self, name: str) -> memoryview:
        """As in `StoredTensors`."""
        return self._files.bytes_of(self.records[name])

    def check(self) -> None:
        """As in `StoredTensors`."""
        self._files.check()


def check_whole(path: Path, whole: mmap.mmap, needed: int = 0) -> None:
    """Refuse a mapped file that was shortened since, or has fewer bytes than are needed.

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


def _map(path: Path, access: int) -> mmap.mmap:
    # Opening a named pipe would wait for ever.
    if not path.is_file():
        raise CheckpointError(f"cannot read {str(path)!r}: it is missing or is not a file")
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=access)
    except (OSError, ValueError) as error:  # ValueError: the file is empty
        raise CheckpointError(f"cannot read {str(path)!r}: {error}") from error
