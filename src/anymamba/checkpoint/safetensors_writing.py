"""Writing a safetensors file, with the types that the library's numpy side does not know.

The tensors' bytes go from where they are to the file, one tensor after the other, and begin at a
multiple of 64: whoever maps them finds them aligned, as long as their sizes are such multiples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["TensorBytes", "write_safetensors"]

_ALIGNMENT = 64


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
        tensors: what it is to hold, in this order.
        metadata: free text fields.

    Example:
        >>> import tempfile
        >>> from anymamba.checkpoint import read_header
        >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> write_safetensors(file, {"D": TensorBytes("F32", (2,), bytes(8))}, {"format": "pt"})
        >>> read_header(file).tensors["D"].shape
        (2,)
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    reached = 0
    for name, tensor in tensors.items():
        offsets = [reached, reached + tensor.nbytes]
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
        reached = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.data)
