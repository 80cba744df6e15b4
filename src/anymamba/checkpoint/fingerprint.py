"""The identity of a model's weights: one sha256 over names, types, shapes and bytes.

A saved state belongs to the weights that made it. The digest depends on nothing but the stored
values: not on the layout, the order or number of files, or whether torch computed it. A head
that repeats the embedding table says nothing new and is left out, since a tied model's file may
or may not hold it. A float32 tensor whose numbers all are bfloat16 counts as one, so that a
bfloat16 model keeps its digest when it is loaded as float32.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from anymamba.checkpoint.architecture import EMBEDDINGS, HEAD, to_transformers_name
from anymamba.checkpoint.dtypes import DTYPES
from anymamba.checkpoint.io import shown
from anymamba.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from anymamba.checkpoint.checkpoint import Checkpoint
    from anymamba.checkpoint.safetensors import TensorRecord

_CHUNK_BYTES = 1 << 20
_BY_TORCH = {dtype.torch: name for name, dtype in DTYPES.items() if name != "C64"}


class _Fingerprint(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    sha256: str


def checkpoint_digest(checkpoint: Checkpoint) -> str:
    """Identify a checkpoint's weights by reading them once, in constant memory.

    Args:
        checkpoint: what `open_checkpoint` returned. A pickled one is loaded through torch.

    Returns:
        64 hexadecimal digits, those that `state_dict_digest` gives for the same weights.

    Raises:
        CheckpointError: a file cannot be read.

    Example:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> from safetensors.numpy import save_file
        >>> import numpy
        >>> from anymamba.checkpoint import open_checkpoint
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "config.json").write_text(json.dumps({"model_type": "mamba"}))
        >>> save_file({"norm_f.weight": numpy.ones(2, "float32")}, folder / "model.safetensors")
        >>> checkpoint_digest(open_checkpoint(folder))[:8]
        '4e05fedd'
    """
    if checkpoint.pickled:
        from anymamba.checkpoint.torch_weights import load_torch_state_dict

        return state_dict_digest(load_torch_state_dict(checkpoint))
    return _combine(
        {
            name: _fingerprint(record.dtype, record.shape, partial(_chunks_of_file, record))
            for name, record in checkpoint.tensors.items()
        }
    )


def state_dict_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Identify the weights of a state dict.

    Args:
        tensors: dense tensors by name, in any layout's names, on any device.

    Returns:
        64 hexadecimal digits, those that `checkpoint_digest` gives for the same weights.

    Raises:
        CheckpointError: a tensor has no plain bytes (quantized, sparse, or on the meta device).

    Example:
        >>> import torch
        >>> state_dict_digest({"norm_f.weight": torch.ones(2)})[:8]
        '4e05fedd'
    """
    return _combine({to_transformers_name(n): _of_tensor(n, t) for n, t in tensors.items()})


def bytes_digest(tensors: Mapping[str, tuple[str, tuple[int, ...], memoryview]]) -> str:
    """Identify weights that lie in memory.

    Args:
        tensors: by name, in any layout's names: safetensors' name of the type, the shape, and
            the bytes as a file holds them.

    Returns:
        64 hexadecimal digits, those that `checkpoint_digest` gives for the same weights.

    Example:
        >>> ones = memoryview(b"\\0\\0\\x80\\x3f" * 2)
        >>> bytes_digest({"norm_f.weight": ("F32", (2,), ones)})[:8]
        '4e05fedd'
    """
    return _combine(
        {to_transformers_name(name): _of_bytes(*parts) for name, parts in tensors.items()}
    )


def _combine(fingerprints: Mapping[str, _Fingerprint]) -> str:
    kept = dict(fingerprints)
    if HEAD in kept and kept[HEAD] == kept.get(EMBEDDINGS):
        del kept[HEAD]
    listing = json.dumps(sorted(kept.items()), separators=(",", ":"))
    return hashlib.sha256(listing.encode()).hexdigest()


def _chunks_of_file(record: TensorRecord) -> Iterator[bytes]:
    left = record.end - record.begin
    try:
        with record.file.open("rb") as file:
            file.seek(record.begin)
            while left and (chunk := file.read(min(left, _CHUNK_BYTES))):
                yield chunk
                left -= len(chunk)
    except OSError as error:
        raise CheckpointError(f"cannot read {str(record.file)!r}: {error.strerror}") from error
    if left:
        raise CheckpointError(
            f"{str(record.file)!r} became shorter while it was read; fetch or write it again"
        )


def _of_bytes(dtype: str, shape: tuple[int, ...], data: memoryview) -> _Fingerprint:
    starts = range(0, len(data), _CHUNK_BYTES)
    return _fingerprint(
        dtype, shape, lambda: (bytes(data[at : at + _CHUNK_BYTES]) for at in starts)
    )


def _fingerprint(
    dtype: str, shape: tuple[int, ...], chunks: Callable[[], Iterable[bytes]]
) -> _Fingerprint:
    """Of a tensor whose bytes come in chunks, whole numbers of 4 bytes but for the last."""
    sha = hashlib.sha256()
    narrow = dtype == "F32" and all(_is_bfloat16(chunk) for chunk in chunks())
    for chunk in chunks():
        sha.update(_upper_halves(chunk) if narrow else chunk)
    return _Fingerprint("BF16" if narrow else dtype, shape, sha.hexdigest())


def _is_bfloat16(chunk: bytes) -> bool:
    """Whether the lower half of every float32 is zero."""
    return not chunk[0::4].strip(b"\0") and not chunk[1::4].strip(b"\0")


def _upper_halves(chunk: bytes) -> bytearray:
    halves = bytearray(len(chunk) // 2)
    halves[0::2] = chunk[2::4]
    halves[1::2] = chunk[3::4]
    return halves


def _of_tensor(name: str, tensor: torch.Tensor) -> _Fingerprint:
    import torch

    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    dtype = str(tensor.dtype).removeprefix("torch.")
    if not plain or tensor.is_meta or tensor.layout != torch.strided or dtype not in _BY_TORCH:
        raise CheckpointError(
            f"tensor {shown(name)} has no plain bytes ({type(tensor).__name__}, {dtype}, on "
            f"{tensor.device}); take the digest of the weights before quantizing them"
        )
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    # The array shares the tensor's memory: little is copied to be hashed.
    return _of_bytes(_BY_TORCH[dtype], tuple(tensor.shape), flat.numpy().data)
