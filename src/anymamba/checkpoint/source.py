"""Opening a model on disk, whatever it is stored in: safetensors, pickles or a GGUF file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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
from anymamba.checkpoint.dtypes import FLOATS, dtype_of
from anymamba.checkpoint.gguf import find_gguf, sentencepiece_file
from anymamba.checkpoint.gguf.reader import GgufModel, read_gguf
from anymamba.checkpoint.hub import SMALL_FILES
from anymamba.checkpoint.io import MAX_JSON_BYTES, parse_json_object, read_bounded, user_path
from anymamba.checkpoint.quantized_folder import PARTS, quantized_bits, quantized_shapes
from anymamba.checkpoint.safetensors.mmap import MappedTensors
from anymamba.checkpoint.shapes import check_repeated_head
from anymamba.checkpoint.tokenizer import JSON, tokenizer_file
from anymamba.checkpoint.torch_weights import to_numpy
from anymamba.errors import CheckpointError, ConfigError, MissingDependencyError

# The largest tokenizer.json of a published model is half of this.
_MOST_COMPANION_BYTES = 4 * MAX_JSON_BYTES


@dataclass(frozen=True)
class Source:
    """A model on disk, whose tensors are read when they are asked for.

    Args:
        config: the config's fields in Transformers' names.
        tensors: by Transformers' names, of a tied model without the head: float32, float64,
            float16, or bfloat16 as its bits in uint16.
        dtypes: in which type each of them is stored, as "BF16" or "Q8_0".
        companions: the other files that belong to the model, by name.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Any]
    dtypes: Mapping[str, str]
    companions: Mapping[str, bytes]

    @property
    def dtype(self) -> str:
        """In which type the embedding table is stored."""
        return self.dtypes[EMBEDDINGS]

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
    """Open a model on disk, to make another of it.

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
    tensors: Mapping[str, Any]
    if checkpoint.pickled:
        tensors = _unpickled(checkpoint)
        dtypes = {name: dtype_of(tensor) for name, tensor in tensors.items()}
    else:
        tensors = open_tensors(checkpoint, FLOATS)
        dtypes = {name: record.dtype for name, record in tensors.records.items()}
    return Source(checkpoint.config, tensors, dtypes, companions_in(checkpoint.folder))


def open_tensors(checkpoint: Checkpoint, types: Sequence[str] = FLOATS[:3]) -> MappedTensors:
    """Map the tensors of safetensors files, checked against the model's config.

    Args:
        checkpoint: what `open_checkpoint` returned; not a pickled one.
        types: those that weights may have which are not quantized.

    Returns:
        The tensors; of a tied model without the head.

    Raises:
        CheckpointError: another program quantized the weights, they do not fit the config, or a
            tied model's files hold a head of its own.

    Example:
        >>> from anymamba.assets import bundled_model
        >>> len(open_tensors(open_checkpoint(bundled_model())))
        72
    """
    config, records, where = checkpoint.config, checkpoint.tensors, repr(str(checkpoint.folder))
    found = {name: record.shape for name, record in records.items()}
    try:
        quantized = quantized_bits(config) is not None
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error
    shapes = expected_shapes(config)
    check_tensors(found, quantized_shapes(config, found) if quantized else shapes, where)
    for name, record in records.items():
        fitting = types if not name.endswith(PARTS) else ["U8" if name.endswith("_q") else "BF16"]
        if record.dtype not in fitting:
            raise CheckpointError(
                f"{name} in {where} is stored as {record.dtype}, expected {' or '.join(fitting)}"
            )
    tensors = MappedTensors(records, shapes)
    if HEAD in records and HEAD not in shapes:
        check_repeated_head(tensors, where)
        del tensors.records[HEAD]
    return tensors


def _unpickled(checkpoint: Checkpoint) -> dict[str, NDArray[Any]]:
    if find_spec("torch") is None:
        raise MissingDependencyError(
            f"the weights in {str(checkpoint.folder)!r} are pickled, and reading pickles needs "
            "PyTorch, once: pip install 'anymamba[torch]'"
        )
    return {n: to_numpy(n, tensor) for n, tensor in load_torch_state_dict(checkpoint).items()}


def companions_in(folder: Path) -> dict[str, bytes]:
    """The other files in a model's or an adapter's folder, such as its tokenizer's, by name.

    A file of SentencePiece's alone gets a tokenizer.json beside it, which other programs read.

    Raises:
        CheckpointError: one cannot be read, or is too large.

    Example:
        >>> from anymamba.assets import bundled_model
        >>> "tokenizer.json" in companions_in(bundled_model())
        True
    """
    found = {
        name: read_bounded(folder / name, _MOST_COMPANION_BYTES)
        for name in SMALL_FILES
        if name != "config.json" and (folder / name).is_file()
    }
    path = tokenizer_file(folder)
    if path is None or path.name == JSON:
        return found
    return _tokenizer(sentencepiece_file.to_json(found[path.name], str(path))) | found


def _tokenizer(text: str, **settings: Any) -> dict[str, bytes]:
    """The two files in which Transformers looks for a tokenizer."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    return {
        "tokenizer.json": text.encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
    }


def _of_gguf(model: GgufModel) -> Source:
    companions: dict[str, bytes] = {}
    if model.tokenizer_json is not None:
        template = {"chat_template": model.chat_template} if model.chat_template is not None else {}
        companions = _tokenizer(model.tokenizer_json, **template)
    dtypes = {name: record.dtype for name, record in model.tensors.records.items()}
    return Source(model.config, model.tensors, dtypes, companions)
