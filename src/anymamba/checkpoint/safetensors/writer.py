"""Writing a safetensors file, whose tensors may be made one after the other, in any order.

What the file will hold is said before, so that each tensor has its place, and none need be kept in
memory once it is written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anymamba.checkpoint.dtypes import DTYPES
from anymamba.renamed import old_names

_ALIGNMENT = 64

__getattr__ = old_names(__name__)


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that will be written.

    Args:
        dtype: safetensors' name of its type, as "F32" or "BF16".
        shape: its dimensions, outermost first.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        return math.prod(self.shape) * DTYPES[self.dtype].nbytes


@dataclass(frozen=True)
class TensorBytes(TensorPlan):
    """A tensor that lies in memory.

    Args:
        data: its bytes, contiguous and little-endian.
    """

    data: bytes | memoryview


class SafetensorsStream:
    """A file that is being written. It is neither flushed to the disk nor renamed at its end.

    Those tensors come first whose size is a multiple of 64 bytes. They then begin at such
    multiples too, and whoever maps them finds them aligned.

    Args:
        path: the file, created or overwritten.
        plans: all that it will hold, by name.
        metadata: free text fields.

    Example:
        >>> import tempfile
        >>> from anymamba.checkpoint import read_header
        >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> with SafetensorsStream(file, {"D": TensorPlan("F32", (2,))}) as stream:
        ...     stream.put("D", bytes(8))
        >>> read_header(file).tensors["D"].shape
        (2,)
    """

    def __init__(
        self, path: Path, plans: Mapping[str, TensorPlan], metadata: Mapping[str, str] | None = None
    ) -> None:
        self._plans = dict(plans)
        self._left = set(plans)
        beginning, self._begins = _beginning(plans, metadata)
        self._file = path.open("wb")
        try:
            self._file.write(beginning)
            self._file.truncate(len(beginning) + sum(plan.nbytes for plan in plans.values()))
        except BaseException:
            self._file.close()
            raise

    def put(self, name: str, data: bytes | memoryview) -> None:
        """Write one of the planned tensors.

        Args:
            name: which one; each once.
            data: its bytes, contiguous and little-endian.

        Raises:
            ValueError: it is not planned, was written before, or has another size.
        """
        size = memoryview(data).nbytes
        if name not in self._left or size != self._plans[name].nbytes:
            raise ValueError(f"{name!r} with {size} bytes is not what remains to be written")
        self._left.remove(name)
        self._file.seek(self._begins[name])
        self._file.write(data)

    def __enter__(self) -> SafetensorsStream:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if error is None and self._left:
            raise ValueError(f"{len(self._left)} tensors were not written: {min(self._left)!r}")


def write_safetensors(
    path: Path, tensors: Mapping[str, TensorBytes], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a file. It is neither flushed to the disk nor renamed: see `write_atomically`.

    Args:
        path: the file.
        tensors: what it is to hold, with types that the library's numpy side need not know.
        metadata: free text fields.

    Example:
        >>> import tempfile
        >>> from anymamba.checkpoint import read_header
        >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> write_safetensors(file, {"D": TensorBytes("F32", (2,), bytes(8))}, {"format": "pt"})
        >>> read_header(file).tensors["D"].shape
        (2,)
    """
    with SafetensorsStream(path, tensors, metadata) as stream:
        for name, tensor in tensors.items():
            stream.put(name, tensor.data)


def _beginning(
    plans: Mapping[str, TensorPlan], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, int]]:
    """The file up to the tensors' bytes, and where in it each tensor begins."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begins, reached = {}, 0
    for name in sorted(plans, key=lambda name: plans[name].nbytes % _ALIGNMENT != 0):
        plan = plans[name]
        begins[name], reached = reached, reached + plan.nbytes
        offsets = [begins[name], reached]
        header[name] = {"dtype": plan.dtype, "shape": plan.shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {n: start + at for n, at in begins.items()}
