"""Opening what `convert` reads: a model's folder in any layout, or a GGUF file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anymamba.checkpoint import (
    Checkpoint,
    check_tensors,
    expected_shapes,
    load_torch_state_dict,
    open_checkpoint,
    resolve,
)
from anymamba.checkpoint.architecture import EMBEDDINGS, HEAD
from anymamba.checkpoint.dtypes import DTYPES, FLOATS, dtype_of
from anymamba.checkpoint.gguf import GgufModel, find_gguf, read_gguf
from anymamba.checkpoint.hub import SMALL_FILES
from anymamba.checkpoint.io import MAX_JSON_BYTES, parse_json_object, user_path
from anymamba.checkpoint.safetensors.mmap import FileMap
from anymamba.errors import CheckpointError, MissingDependencyError

if TYPE_CHECKING:
    import torch

__all__ = ["Source", "companions_in", "open_source"]

# The largest tokenizer.json of a published model is half of this.
_MOST_COMPANION_BYTES = 4 * MAX_JSON_BYTES


@dataclass(frozen=True)
class Source:
    """A model that is to be converted.

    Args:
        config: the config's fields in Transformers' names.
        tensors: by Transformers' names, of a tied model without the head: float32, float64,
            float16, or bfloat16 as its bits in uint16.
        kinds: in which type each of them is stored, as "BF16" or "Q8_0".
        companions: the other files that belong to the model, by name.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, NDArray[Any]]
    kinds: Mapping[str, str]
    companions: Mapping[str, bytes]

    @property
    def dtype(self) -> str:
        """In which type the embedding table is stored."""
        return self.kinds[EMBEDDINGS]

    def text(self, name: str) -> str | None:
        """A companion as text, if it is there.

        Raises:
            CheckpointError: it is not UTF-8.
        """
        data = self.companions.get(name)
        try:
            return None if data is None else data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{name} is not UTF-8 text (byte {error.start})") from error

    def chat_template(self) -> str | None:
        """How a chat becomes a prompt, in Jinja, if some companion says."""
        template: Any = self.text("chat_template.jinja")
        if template is None and "tokenizer_config.json" in self.companions:
            name = "tokenizer_config.json"
            template = parse_json_object(self.companions[name], name).get("chat_template")
        return template if isinstance(template, str) else None


def open_source(source: str | os.PathLike[str], offline: bool = False) -> Source:
    """Open a model that is to be converted.

    Args:
        source: a folder, a GGUF file or a folder that holds one, or a hub id.
        offline: use what was downloaded before, and no network.

    Returns:
        The model, checked against its config.

    Raises:
        CheckpointError: it is missing, broken, quantized, or does not fit its config.
        MissingDependencyError: it is pickled and there is no torch.

    Example:
        >>> from anymamba.assets import bundled_model
        >>> source = open_source(bundled_model())
        >>> source.dtype, sorted(source.companions)[0]
        ('BF16', 'generation_config.json')
    """
    if (file := find_gguf(user_path(source))) is not None:
        return _of_gguf(read_gguf(file))
    checkpoint = open_checkpoint(resolve(source, offline=offline))
    where = repr(str(checkpoint.folder))
    if "quantization_config" in checkpoint.config:
        raise CheckpointError(
            f"the weights in {where} are quantized, and have lost what another form would need; "
            "convert the model that they were made of"
        )
    expected = expected_shapes(checkpoint.config)
    tensors: Mapping[str, NDArray[Any]]
    if checkpoint.pickled:
        tensors, kinds = _unpickled(checkpoint)
    else:
        found = {name: record.shape for name, record in checkpoint.tensors.items()}
        check_tensors(found, expected, where)
        tensors = _Mapped(checkpoint)
        kinds = {name: record.dtype for name, record in checkpoint.tensors.items()}
        _check_repeated_head(tensors, expected, where)
    return Source(checkpoint.config, tensors, kinds, companions_in(checkpoint.folder))


class _Mapped(Mapping[str, NDArray[Any]]):
    """A checkpoint's tensors where they lie in their files."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._records, self._files = checkpoint.tensors, FileMap()

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, name: str) -> NDArray[Any]:
        record = self._records[name]
        if record.dtype not in FLOATS:
            raise CheckpointError(
                f"{name} in {str(record.file)!r} is stored as {record.dtype}, expected one of "
                f"{', '.join(FLOATS)}"
            )
        # The numbers must come from the file whose header was read, and not from a newer one.
        if self._files.header(record.file).tensors.get(record.name) != record:
            raise CheckpointError(
                f"{str(record.file)!r} was replaced while it was read; convert the model again"
            )
        data = np.frombuffer(self._files.bytes_of(record), DTYPES[record.dtype].numpy)
        return data.reshape(record.shape)


def _check_repeated_head(
    tensors: Mapping[str, NDArray[Any]], expected: Mapping[str, Any], where: str
) -> None:
    """A tied model's head may be stored, if it is the embedding table; another would be lost."""
    if HEAD in tensors and HEAD not in expected:
        head, table = tensors[HEAD], tensors[EMBEDDINGS]
        if head.dtype != table.dtype or head.tobytes() != table.tobytes():
            raise CheckpointError(
                f"the config in {where} ties {HEAD} to {EMBEDDINGS}, but the two differ there; "
                "set tie_word_embeddings to false to use both"
            )


def _unpickled(checkpoint: Checkpoint) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    if find_spec("torch") is None:
        raise MissingDependencyError(
            f"the weights in {str(checkpoint.folder)!r} are pickled, and reading pickles needs "
            "PyTorch, once: pip install 'anymamba[torch]'"
        )
    tensors = {n: _of_torch(n, t) for n, t in load_torch_state_dict(checkpoint).items()}
    return tensors, {name: dtype_of(tensor) for name, tensor in tensors.items()}


def _of_torch(name: str, tensor: torch.Tensor) -> NDArray[Any]:
    import torch

    if tensor.dtype == torch.bfloat16:
        bits: NDArray[Any] = tensor.contiguous().view(torch.int16).numpy()
        return bits.view(np.uint16)
    if tensor.dtype not in (torch.float32, torch.float16, torch.float64):
        raise CheckpointError(
            f"{name} is stored as {tensor.dtype}, expected float32, float16, bfloat16 or float64"
        )
    array: NDArray[Any] = tensor.contiguous().numpy()
    return array


def companions_in(folder: Path) -> dict[str, bytes]:
    """The files beside the weights that belong to a model, such as its tokenizer's, by name.

    Args:
        folder: the model's, or an adapter's.

    Raises:
        CheckpointError: one cannot be read, or is too large.

    Example:
        >>> from anymamba.assets import bundled_model
        >>> "tokenizer.json" in companions_in(bundled_model())
        True
    """
    found = {}
    for name in SMALL_FILES:
        path = folder / name
        if name == "config.json" or not path.is_file():
            continue
        try:
            with path.open("rb") as file:
                data = file.read(_MOST_COMPANION_BYTES + 1)
        except OSError as error:
            raise CheckpointError(f"cannot read {str(path)!r}: {error.strerror}") from error
        if len(data) > _MOST_COMPANION_BYTES:
            raise CheckpointError(
                f"{str(path)!r} is larger than the {_MOST_COMPANION_BYTES} bytes allowed"
            )
        found[name] = data
    return found


def _of_gguf(model: GgufModel) -> Source:
    companions: dict[str, bytes] = {}
    if model.tokenizer_json is not None:
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        if model.chat_template is not None:
            settings["chat_template"] = model.chat_template
        companions = {
            "tokenizer.json": model.tokenizer_json.encode(),
            "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode(),
        }
    kinds = {name: record.dtype for name, record in model.tensors.records.items()}
    return Source(model.config, model.tensors, kinds, companions)
