"""Writing a safetensors file of tensors that lie in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from anymamba.checkpoint.safetensors.stream import SafetensorsStream


@dataclass(frozen=True)
class TensorBytes:
    """A tensor to be written.

    Args:
        dtype: safetensors' name of its type, as "F32" or "BF16".
        shape: its dimensions, outermost first.
        data: its bytes, contiguous and little-endian.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview

    @property
    def nbytes(self) -> int:
        """How many bytes it takes in the file."""
        return memoryview(self.data).nbytes


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
