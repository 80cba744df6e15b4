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

# Transformers' fields by GGUF's. All of them must be there.
_COUNTS = {
    "mamba.embedding_length": "hidden_size",
    "mamba.block_count": "num_hidden_layers",
    "mamba.ssm.conv_kernel": "conv_kernel",
    "mamba.ssm.state_size": "state_size",
    "mamba.ssm.time_step_rank": "time_step_rank",
}
_INNER = "mamba.ssm.inner_size"
_EPSILON = "mamba.attention.layer_norm_rms_epsilon"
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
    records = _by_our_names(header)
    try:
        config = _config(header, records)
        expected = expected_shapes(config)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error
    found = {name: _our_shape(name, record.shape) for name, record in records.items()}
    check_tensors(found, expected, where)
    template = header.metadata.get(CHAT_TEMPLATE)
    return GgufModel(
        config,
        GgufTensors({name: records[name] for name in expected}, header.data, keep_blocks),
        tokenizer_json(header.metadata, where) if tokenizer else None,
        template if isinstance(template, str) else None,
    )


class GgufTensors(StoredTensors):
    """The tensors of a GGUF file by Transformers' names, in Transformers' form.

    Args:
        records: where the tensors are, by Transformers' names.
        data: by the file, its bytes, mapped.
        keep_blocks: as in `read_gguf`.

    Raises:
        CheckpointError: when a tensor is asked for that holds numbers it must not.
        MissingDependencyError: when `blocks.widened` needs the `gguf` package for it.

    Example:
        >>> len(GgufTensors({}, {}, keep_blocks=True))
        0
    """

    def __init__(
        self,
        records: Mapping[str, TensorRecord],
        data: Mapping[Path, memoryview],
        keep_blocks: bool,
    ) -> None:
        super().__init__(records)
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
        values = values.reshape(_our_shape(name, record.shape))
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


def _by_our_names(header: GgufHeader) -> dict[str, TensorRecord]:
    """The tensors' places by Transformers' names, if the file is of a Mamba at all."""
    architecture = header.metadata.get("general.architecture")
    if architecture != MAMBA.gguf:
        raise CheckpointError(
            f"{str(header.file)!r} is a model of architecture {shown(architecture)}, expected "
            f"{MAMBA.gguf!r}: AnyMamba reads Mamba and Falcon-Mamba"
        )
    return {from_gguf_name(name): record for name, record in header.tensors.items()}


def _config(header: GgufHeader, records: Mapping[str, TensorRecord]) -> dict[str, Any]:
    metadata = header.metadata
    missing = [key for key in (*_COUNTS, _INNER, _EPSILON) if key not in metadata]
    if missing or EMBEDDINGS not in records:
        what = ", ".join(missing) or "the tensor token_embd.weight"
        raise ConfigError(f"it lacks {what}; convert the model anew")
    norms_maps = metadata.get(NORMS_MAPS, False)
    if type(norms_maps) is not bool:
        raise ConfigError(f"{NORMS_MAPS} is {shown(norms_maps)}, expected true or false")
    config: dict[str, Any] = {"model_type": (FALCON_MAMBA if norms_maps else MAMBA).name}
    config |= {ours: metadata[theirs] for theirs, ours in _COUNTS.items()}
    config["expand"] = _expand(metadata)
    config["layer_norm_epsilon"] = _epsilon(_EPSILON, metadata[_EPSILON])
    if norms_maps:  # llama.cpp has one epsilon for all norms
        key = MIXER_EPSILON if MIXER_EPSILON in metadata else _EPSILON
        config["mixer_rms_eps"] = _epsilon(key, metadata[key])
    config["vocab_size"] = metadata.get("mamba.vocab_size", records[EMBEDDINGS].shape[0])
    config["use_bias"] = False
    config["use_conv_bias"] = in_layer(0, "mixer.conv1d.bias") in records
    config["tie_word_embeddings"] = HEAD not in records
    stored = records[EMBEDDINGS].dtype
    config["dtype"] = DTYPES[stored if stored in PLAIN else "F32"].torch
    vocab_size = model_shape(config).vocab_size  # refuses a shape that makes no sense
    return config | _special_tokens(metadata, vocab_size)


def _expand(metadata: Mapping[str, Any]) -> int:
    inner, width = metadata[_INNER], metadata["mamba.embedding_length"]
    if type(inner) is not int or type(width) is not int or width < 1 or inner % width:
        raise ConfigError(
            f"{_INNER} is {shown(inner)}, expected a multiple of mamba.embedding_length, "
            f"{shown(width)}"
        )
    return inner // width


def _epsilon(key: str, value: Any) -> float:
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


def _our_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if role_of(name) == "convolution" and len(shape) == 2:
        return (shape[0], 1, shape[1])
    return shape


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
