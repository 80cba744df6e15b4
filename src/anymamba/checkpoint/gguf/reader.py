"""Reading a Mamba from a GGUF file: its config, its tensors, its tokenizer.

What the file says is checked by `header` first. Numbers in F32, F16 and BF16 stay where
they lie in the file; `blocks` reads the other types.

A comes as itself and becomes A_log, by a logarithm in float64 that is rounded to float32. What
llama.cpp computes with, -exp(A_log), is met to within a few units in the last place.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anymamba.checkpoint import TensorRecord, check_tensors, expected_shapes, model_shape
from anymamba.checkpoint.architecture import (
    EMBEDDINGS,
    FALCON_MAMBA,
    HEAD,
    MAMBA,
    MAMBA2,
    Architecture,
    in_layer,
    is_matrix,
    role_of,
)
from anymamba.checkpoint.dtypes import DTYPES, as_float32
from anymamba.checkpoint.gguf.blocks import KEPT, PLAIN, kept_blocks, widened
from anymamba.checkpoint.gguf.header import GgufHeader
from anymamba.checkpoint.gguf.names import MIXER_EPSILON, NORMS_MAPS, from_gguf_name
from anymamba.checkpoint.gguf.parts import read_gguf_files
from anymamba.checkpoint.gguf.tokenizer import CHAT_TEMPLATE, tokenizer_json
from anymamba.checkpoint.io import shown
from anymamba.checkpoint.quantization import Tensor
from anymamba.checkpoint.safetensors.mmap import StoredTensors, check_whole
from anymamba.errors import CheckpointError, ConfigError

# Transformers' fields by GGUF's, behind the architecture's name. All of them must be there.
_COUNTS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "ssm.conv_kernel": "conv_kernel",
    "ssm.state_size": "state_size",
}
_OWN_COUNTS = {
    MAMBA.gguf: {"ssm.time_step_rank": "time_step_rank"},
    MAMBA2.gguf: {"ssm.time_step_rank": "num_heads", "ssm.group_count": "n_groups"},
}
_INNER = "ssm.inner_size"
_EPSILON = "attention.layer_norm_rms_epsilon"
_TOKENS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}


class GgufModel(NamedTuple):
    """A model in a GGUF file.

    Args:
        config: the config's fields in Transformers' names.
        tensors: the tensors by Transformers' names, each made when it is asked for.
        tokenizer_json: the text of a tokenizer.json, or None where the file has no tokenizer.
        chat_template: how a chat becomes a prompt, in Jinja, or None.
    """

    config: dict[str, Any]
    tensors: GgufTensors
    tokenizer_json: str | None
    chat_template: str | None


def read_gguf(
    path: str | os.PathLike[str], *, keep_blocks: bool = False, tokenizer: bool = True
) -> GgufModel:
    """Open a GGUF file of a Mamba. The weights stay in the file until they are asked for.

    Args:
        path: the file, or any part of one that was split.
        keep_blocks: give matrices in the types of `blocks.KEPT` as `QuantizedArray` in groups
            of 32, for the kernels, rather than as float32. This needs no `gguf` package.
        tokenizer: whether the file's tokenizer is wanted, and refused if it cannot be read.

    Returns:
        Config, tensors, tokenizer and chat template. The tensors fit the config.

    Raises:
        CheckpointError: the file is missing or broken, holds another architecture, other types
            of tensors or another kind of tokenizer, or lacks something; the message names it.

    Example:
        >>> import tempfile
        >>> from anymamba.checkpoint.gguf.writer import write_gguf
        >>> config = {"vocab_size": 8, "hidden_size": 32, "num_hidden_layers": 1}
        >>> tensors = {n: np.ones(s, np.float32) for n, s in expected_shapes(config).items()}
        >>> file = os.path.join(tempfile.mkdtemp(), "model.gguf")
        >>> write_gguf(file, config, tensors, weights="q8_0")
        >>> model = read_gguf(file)
        >>> model.config["hidden_size"], model.tensors["backbone.norm_f.weight"].shape
        (32, (32,))
    """
    header = read_gguf_files(path)
    where = repr(str(header.file))
    try:
        architecture = _architecture(header)
        records = {from_gguf_name(n, architecture): r for n, r in header.tensors.items()}
        config = _config(header.metadata, architecture, records)
        stored = architecture.gguf_shapes(model_shape(config))
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error
    found = {name: _padded(record.shape, stored.get(name, ())) for name, record in records.items()}
    check_tensors(found, stored, where)
    records = {name: replace(records[name], shape=stored[name]) for name in stored}
    template = header.metadata.get(CHAT_TEMPLATE)
    return GgufModel(
        config,
        GgufTensors(records, expected_shapes(config), header.data, keep_blocks),
        tokenizer_json(header.metadata, where) if tokenizer else None,
        template if isinstance(template, str) else None,
    )


class GgufTensors(StoredTensors):
    """The tensors of a GGUF file by Transformers' names, in Transformers' form.

    Args:
        records: where the tensors are, by Transformers' names.
        shapes: Transformers' shapes of them.
        data: by the file, its bytes, mapped.
        keep_blocks: as in `read_gguf`.

    Raises:
        CheckpointError: when a tensor is asked for that holds numbers it must not.
        MissingDependencyError: when `blocks.widened` needs the `gguf` package for it.

    Example:
        >>> len(GgufTensors({}, {}, {}, keep_blocks=True))
        0
    """

    def __init__(
        self,
        records: Mapping[str, TensorRecord],
        shapes: Mapping[str, tuple[int, ...]],
        data: Mapping[Path, memoryview],
        keep_blocks: bool,
    ) -> None:
        super().__init__(records)
        self._shapes = shapes
        self._data = data
        self._keep_blocks = keep_blocks

    def __getitem__(self, name: str) -> Tensor:
        record, data = self.records[name], self.bytes_of(name)
        if record.dtype in KEPT and self._keep_blocks and is_matrix(name):
            return kept_blocks(record, data)
        if record.dtype in PLAIN:
            values = _plain(record, data)
        else:
            values = widened(record.dtype, data, record.shape)
        values = values.reshape(self._shapes[name])
        return _a_log(record, values) if role_of(name) == "decay" else values

    def bytes_of(self, name: str) -> memoryview:
        """As in `StoredTensors`."""
        record = self.records[name]
        self.check()
        return self._data[record.file][record.begin : record.end]

    def check(self) -> None:
        """As in `StoredTensors`."""
        for file, data in self._data.items():
            if isinstance(data.obj, mmap.mmap):
                check_whole(file, data.obj)


def _architecture(header: GgufHeader) -> Architecture:
    """The architecture that a file is of, if it is one of AnyMamba's.

    Raises:
        ConfigError: a value of the header is none that it can have.
    """
    name = header.metadata.get("general.architecture")
    if name == MAMBA2.gguf:
        return MAMBA2
    if name != MAMBA.gguf:
        raise ConfigError(
            f"this is a model of architecture {shown(name)}, expected {MAMBA.gguf!r} or "
            f"{MAMBA2.gguf!r}: AnyMamba reads Mamba, Falcon-Mamba and Mamba-2"
        )
    norms_maps = header.metadata.get(NORMS_MAPS, False)
    if type(norms_maps) is not bool:
        raise ConfigError(f"{NORMS_MAPS} is {shown(norms_maps)}, expected true or false")
    return FALCON_MAMBA if norms_maps else MAMBA


def _config(
    metadata: Mapping[str, Any], architecture: Architecture, records: Mapping[str, TensorRecord]
) -> dict[str, Any]:
    def key(name: str) -> str:
        return f"{architecture.gguf}.{name}"

    counts = _COUNTS | _OWN_COUNTS[architecture.gguf]
    missing = [key(name) for name in (*counts, _INNER, _EPSILON) if key(name) not in metadata]
    if missing or EMBEDDINGS not in records:
        what = ", ".join(missing) or "the tensor token_embd.weight"
        raise ConfigError(f"it lacks {what}; convert the model anew")
    config: dict[str, Any] = {"model_type": architecture.name}
    config |= {ours: metadata[key(theirs)] for theirs, ours in counts.items()}
    config["expand"] = _quotient(metadata, key(_INNER), key("embedding_length"))
    if architecture is MAMBA2:
        config["head_dim"] = _quotient(metadata, key(_INNER), key("ssm.time_step_rank"))
    config["layer_norm_epsilon"] = _epsilon(metadata, key(_EPSILON))
    if architecture.norms_maps:  # llama.cpp has one epsilon for all norms
        own = MIXER_EPSILON if MIXER_EPSILON in metadata else key(_EPSILON)
        config["mixer_rms_eps"] = _epsilon(metadata, own)
    config["vocab_size"] = metadata.get(key("vocab_size"), records[EMBEDDINGS].shape[0])
    config["use_bias"] = False
    config["use_conv_bias"] = in_layer(0, "mixer.conv1d.bias") in records
    config["tie_word_embeddings"] = HEAD not in records
    stored = records[EMBEDDINGS].dtype
    config["dtype"] = DTYPES[stored if stored in PLAIN else "F32"].torch
    vocab_size = model_shape(config).vocab_size  # refuses a shape that makes no sense
    return config | _special_tokens(metadata, vocab_size)


def _quotient(metadata: Mapping[str, Any], key: str, divisor: str) -> int:
    number, by = metadata[key], metadata[divisor]
    if type(number) is not int or type(by) is not int or by < 1 or number % by:
        raise ConfigError(
            f"{key} is {shown(number)}, expected a multiple of {divisor}, {shown(by)}"
        )
    return number // by


def _epsilon(metadata: Mapping[str, Any], key: str) -> float:
    value = metadata[key]
    if not isinstance(value, float) or not math.isfinite(value) or value < 0:
        raise ConfigError(f"{key} is {shown(value)}, expected a number of at least 0")
    return float(str(np.float32(value)))  # the 1e-05 that was meant, not its float32


def _special_tokens(metadata: Mapping[str, Any], vocab_size: int) -> dict[str, int]:
    config: dict[str, int] = {}
    for theirs, ours in _TOKENS.items():
        key = f"tokenizer.ggml.{theirs}_token_id"
        if key not in metadata:
            continue
        value = metadata[key]
        if type(value) is not int or not 0 <= value < vocab_size:
            raise ConfigError(f"{key} is {shown(value)}, expected a number below {vocab_size}")
        config[ours] = value
    return config


def _padded(shape: tuple[int, ...], expected: tuple[int, ...]) -> tuple[int, ...]:
    """A shape with the 1s before it that llama.cpp's programs leave out."""
    return (1,) * (len(expected) - len(shape)) + shape


def _plain(record: TensorRecord, data: memoryview) -> NDArray[Any]:
    array = np.frombuffer(data, PLAIN[record.dtype]).reshape(record.shape)
    return array if array.flags.aligned else array.copy()


def _a_log(record: TensorRecord, values: NDArray[Any]) -> NDArray[np.float32]:
    a = as_float32(values)
    if not (np.isfinite(a) & (a <= 0)).all():
        raise CheckpointError(
            f"tensor {shown(record.name)} in {str(record.file)!r} holds numbers above zero or no "
            "numbers; A is -exp(A_log) and has none such"
        )
    with np.errstate(divide="ignore"):  # A of zero remembers for ever: A_log is -infinity
        return np.log(-a.astype(np.float64)).astype(np.float32)
