"""The identity of a model's weights: one sha256 over names, types, shapes and bytes.

A saved state belongs to the weights that made it. The digest depends on nothing but the stored
values: not on the layout, the order or number of files, or whether torch computed it. A head
that repeats the embedding table says nothing new and is left out, since a tied model's file may
or may not hold it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from anymamba.checkpoint.names import EMBEDDINGS, HEAD, to_transformers_name
from anymamba.checkpoint.wording import shown
from anymamba.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from anymamba.checkpoint.reading import Checkpoint
    from anymamba.checkpoint.safetensors_header import TensorRecord

__all__ = ["checkpoint_digest", "state_dict_digest"]

_CHUNK_BYTES = 1 << 20


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
        '8207fcc0'
    """
    if checkpoint.pickled:
        from anymamba.checkpoint.torch_weights import load_torch_state_dict

        return state_dict_digest(load_torch_state_dict(checkpoint))
    return _combine({name: _of_record(record) for name, record in checkpoint.tensors.items()})


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
        '8207fcc0'
    """
    return _combine({to_transformers_name(n): _of_tensor(n, t) for n, t in tensors.items()})


def _combine(fingerprints: Mapping[str, _Fingerprint]) -> str:
    kept = dict(fingerprints)
    if HEAD in kept and kept[HEAD] == kept.get(EMBEDDINGS):
        del kept[HEAD]
    listing = json.dumps(sorted(kept.items()), separators=(",", ":"))
    return hashlib.sha256(listing.encode()).hexdigest()


def _of_record(record: TensorRecord) -> _Fingerprint:
    sha = hashlib.sha256()
    left = record.end - record.begin
    try:
        with record.file.open("rb") as file:
            file.seek(record.begin)
            while left and (chunk := file.read(min(left, _CHUNK_BYTES))):
                sha.update(chunk)
                left -= len(chunk)
    except OSError as error:
        raise CheckpointError(f"cannot read {str(record.file)!r}: {error.strerror}") from error
    if left:
        raise CheckpointError(
            f"{str(record.file)!r} became shorter while it was read; fetch or write it again"
        )
    return _Fingerprint(record.dtype, record.shape, sha.hexdigest())


def _of_tensor(name: str, tensor: torch.Tensor) -> _Fingerprint:
    import torch

    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    dtype = str(tensor.dtype).removeprefix("torch.")
    if not plain or tensor.is_meta or tensor.layout != torch.strided or dtype not in _DTYPES:
        raise CheckpointError(
            f"tensor {shown(name)} has no plain bytes ({type(tensor).__name__}, {dtype}, on "
            f"{tensor.device}); take the digest of the weights before quantizing them"
        )
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    # The array shares the tensor's memory: nothing is copied to be hashed.
    sha = hashlib.sha256(flat.numpy().data)
    return _Fingerprint(_DTYPES[dtype], tuple(tensor.shape), sha.hexdigest())


# torch's names of the types that weights are stored in, and safetensors' names of the same.
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
