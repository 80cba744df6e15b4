"""Loading a checkpoint's weights as torch tensors. torch is imported when this is called."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anymamba.checkpoint.architecture import HEAD
from anymamba.checkpoint.checkpoint import Checkpoint, canonical_names, check_shard
from anymamba.checkpoint.dtypes import DTYPES, FLOATS, dtype_of
from anymamba.checkpoint.files import WeightFiles
from anymamba.checkpoint.io import shown
from anymamba.checkpoint.safetensors import TensorRecord
from anymamba.checkpoint.shapes import (
    check_repeated_head,
    check_tensors,
    expected_shapes,
    model_shape,
)
from anymamba.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from anymamba.checkpoint.safetensors.mmap import FileMap

# Windows would let nobody save over the file, nor remove it, as long as the tensors live.
_STAYS_MAPPED = os.name != "nt"
_ZIP_SIGNATURE = b"PK\x03\x04"


def load_torch_state_dict(
    checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, torch.Tensor]:
    """Load all weights, checked against the shapes that they must have.

    Nothing in a file is run: pickles are read by torch's restricted reader. The tensors are
    mapped from the files where the format allows it, so they cost memory once they are used,
    and the files must stay as they are until the tensors are copied.

    Args:
        checkpoint: what `open_checkpoint` returned.
        expected: shape by Transformers' name; by default what the checkpoint's config asks
            for. Give others to load a model without its head, or with a changed config.

    Returns:
        Exactly the expected tensors, on the CPU, in the types they are stored in.

    Raises:
        CheckpointError: a file is broken or would run code; tensors are missing, unexpected
            or of a wrong shape or type; or a tied model's file holds a head of its own.

    Example:
        >>> import json, tempfile
        >>> import torch
        >>> from anymamba.checkpoint import open_checkpoint
        >>> folder = Path(tempfile.mkdtemp())
        >>> config = {"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 1}
        >>> _ = (folder / "config.json").write_text(json.dumps(config))
        >>> weights = {name: torch.ones(shape) for name, shape in expected_shapes(config).items()}
        >>> torch.save(weights, folder / "pytorch_model.bin")
        >>> load_torch_state_dict(open_checkpoint(folder))["backbone.norm_f.weight"].shape
        torch.Size([8])
    """
    if expected is None:
        expected = expected_shapes(checkpoint.config)
    tensors = load_named_tensors(checkpoint)
    where = repr(str(checkpoint.folder))
    check_tensors({name: tuple(t.shape) for name, t in tensors.items()}, expected, where)
    check_floating_point(tensors, where)
    if HEAD not in expected and HEAD in tensors:
        if model_shape(checkpoint.config).tied:
            check_repeated_head(tensors, where)
        del tensors[HEAD]
    return tensors


def load_named_tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Load all weights by Transformers' names, whichever and of whatever shape they are.

    They are on the CPU, in the types they are stored in. A name that no layout knows stays.

    Raises:
        CheckpointError: a file is broken or would run code.

    Example:
        >>> from anymamba.assets import bundled_model
        >>> from anymamba.checkpoint import open_checkpoint
        >>> len(load_named_tensors(open_checkpoint(bundled_model())))
        72
    """
    if checkpoint.pickled:
        stored = load_stored_tensors(checkpoint.files)
        names = canonical_names(stored, checkpoint.files.paths[0], checkpoint.key_mapping)
        return {new: stored[old] for new, old in names.items()}
    from anymamba.checkpoint.safetensors.mmap import FileMap

    maps = FileMap(private=True)
    return {name: _mapped(maps, maps.current(r)) for name, r in checkpoint.tensors.items()}


def check_floating_point(tensors: Mapping[str, torch.Tensor], where: object) -> None:
    """Refuse weights that are stored as whole numbers.

    Raises:
        CheckpointError: the message names the first.

    Example:
        >>> import torch
        >>> check_floating_point({"D": torch.ones(2)}, "here")
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{name} in {where} is stored as {tensor.dtype}, expected floating-point numbers"
            )


def load_stored_tensors(files: WeightFiles) -> dict[str, torch.Tensor]:
    """Load all tensors of a model's files, of whatever kind of model, under their stored names.

    Nothing in a file is run, and the tensors are mapped where the format allows it, as in
    `load_torch_state_dict`; but names, shapes and types are for the caller to check.

    Args:
        files: what `find_weight_files` returned.

    Returns:
        The tensors, on the CPU, in the types they are stored in.

    Raises:
        CheckpointError: a file is broken or would run code, or a shard does not hold what the
            index says.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from anymamba.checkpoint.files import find_weight_files
        >>> folder = Path(tempfile.mkdtemp())
        >>> torch.save({"conv1d.bias": torch.ones(3)}, folder / "pytorch_model.bin")
        >>> load_stored_tensors(find_weight_files(folder))
        {'conv1d.bias': tensor([1., 1., 1.])}
    """
    from anymamba.checkpoint.safetensors.mmap import FileMap

    stored: dict[str, torch.Tensor] = {}
    maps = FileMap(private=True)
    for path in files.paths:
        if files.pickled:
            tensors = _read_pickle(path)
        else:
            records = maps.header(path).tensors
            tensors = {name: _mapped(maps, record) for name, record in records.items()}
        check_shard(files, path, tensors)
        stored |= tensors
    return stored


def to_torch(array: NDArray[Any]) -> torch.Tensor:
    """Copy an array into a tensor of the type that `dtype_of` tells.

    Example:
        >>> import numpy as np
        >>> to_torch(np.uint16([0x3F80]))
        tensor([1.], dtype=torch.bfloat16)
    """
    import torch

    dtype = getattr(torch, DTYPES[dtype_of(array)].torch)
    return torch.from_numpy(array.view(f"i{array.itemsize}").copy()).view(dtype)


def to_numpy(name: str, tensor: torch.Tensor) -> NDArray[Any]:
    """An array of the type of a tensor on the CPU, in its memory; messages call it `name`.

    Raises:
        CheckpointError: it has a type that weights are not stored in.

    Example:
        >>> import torch
        >>> to_numpy("mixer.D", torch.ones(1, dtype=torch.bfloat16))
        array([16256], dtype=uint16)
    """
    import torch

    dtype = next((d for d in FLOATS if str(tensor.dtype) == f"torch.{DTYPES[d].torch}"), None)
    if dtype is None:
        raise CheckpointError(
            f"{name} is stored as {tensor.dtype}, expected float32, float16, bfloat16 or float64"
        )
    bits = tensor.contiguous().view(getattr(torch, f"int{8 * DTYPES[dtype].nbytes}")).numpy()
    array: NDArray[Any] = bits.view(str(DTYPES[dtype].numpy))
    return array


def _mapped(maps: FileMap, record: TensorRecord) -> torch.Tensor:
    """A tensor where it lies; a copy on Windows, or if numbers straddle their type's addresses."""
    import torch

    data, dtype = maps.bytes_of(record), getattr(torch, DTYPES[record.dtype].torch)
    if not data:
        return torch.empty(record.shape, dtype=dtype)
    is_aligned = record.begin % dtype.itemsize == 0
    whole = data if is_aligned and _STAYS_MAPPED else bytearray(data)
    return torch.frombuffer(whole, dtype=dtype).reshape(record.shape)


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    import torch

    try:
        with path.open("rb") as file:
            # Files of torch before 1.6 are no archives and cannot be mapped.
            mapped = file.read(len(_ZIP_SIGNATURE)) == _ZIP_SIGNATURE
        mapped &= _STAYS_MAPPED
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # broken pickles raise anything: IndexError, EOFError, RuntimeError
        raise CheckpointError(_why_unreadable(path, error)) from error
    return _plain_tensors(path, value)


def _why_unreadable(path: Path, error: Exception) -> str:
    """torch's own messages run over many lines and recommend to let the file run its code."""
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    if named:
        return (
            f"{str(path)!r} was refused: it would run code ({named[1]}) when loaded; get the model "
            "as safetensors from a source you trust"
        )
    return (
        f"{str(path)!r} holds no weights that can be read ({type(error).__name__}): it is "
        "truncated, broken, or no file of torch.save; fetch it again or get it as safetensors"
    )


def _plain_tensors(path: Path, value: Any) -> dict[str, torch.Tensor]:
    import torch

    if not isinstance(value, dict):
        raise CheckpointError(
            f"{str(path)!r} holds a {type(value).__name__}, expected tensors by name"
        )
    for name, tensor in value.items():
        plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        if not isinstance(name, str) or not plain or tensor.is_meta or tensor.is_quantized:
            raise CheckpointError(
                f"{str(path)!r} holds {shown(name)}, which is no plain tensor with a name "
                f"({type(tensor).__name__}); save the model's state_dict alone"
            )
    return {name: tensor.detach() for name, tensor in value.items()}
