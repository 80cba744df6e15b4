"""Writing a Mamba as a GGUF file, for llama.cpp and for `read_gguf`.

One tensor at a time is in memory. What llama.cpp computes with in float32 is kept so: norms, the
convolution, A, D and biases. A matrix whose rows are no whole number of blocks becomes float16.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anymamba.checkpoint import ModelShape, model_shape, write_atomically
from anymamba.checkpoint.architecture import MAMBA2, architecture_of, is_matrix, role_of
from anymamba.checkpoint.dtypes import as_float32, check_fits_float16
from anymamba.checkpoint.finite import check_finite
from anymamba.checkpoint.gguf.blocks import import_gguf
from anymamba.checkpoint.gguf.names import MIXER_EPSILON, to_gguf_name
from anymamba.checkpoint.gguf.token_lists import PREFIX
from anymamba.checkpoint.gguf.tokenizer import WHOLE, llama_tokenizer
from anymamba.checkpoint.io import shown
from anymamba.checkpoint.tokenizer import tokenizer_from_json
from anymamba.errors import ConfigError

GGUF_WEIGHTS = ("f32", "f16", "bf16", "q8_0", "q4_0")
"""The types that matrices can have."""

_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}  # llama.cpp's numbers
_UNLIMITED = [0.0, math.inf]
_NEEDED = {
    "expand": 2,
    "use_bias": False,
    "use_conv_bias": True,
    "hidden_act": "silu",
    "time_step_limit": _UNLIMITED,
    "use_gated_norm": True,
    "gate_after_norm": False,
}
_CONTEXT = 1 << 20  # a Mamba has no limit; llama.cpp refuses to go beyond this
_EPSILON, _MIXER_EPSILON = 1e-5, 1e-6  # where the config says nothing
_PROBE_BYTES = 1 << 20


def write_gguf(
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, NDArray[Any]],
    weights: str = "f32",
    tokenizer_json: str | None = None,
    chat_template: str | None = None,
) -> None:
    """Write a model as a GGUF file, in one step: a reader sees all of it or the file before.

    Args:
        path: the file to create or replace.
        config: fields in Transformers' names.
        tensors: by Transformers' names: float32, float16, or bfloat16 as its bits in uint16. Each
            is asked for once.
        weights: the type of the matrices, one of `GGUF_WEIGHTS`.
        tokenizer_json: the text of a tokenizer.json. It is kept whole, and as llama.cpp's lists
            where llama.cpp has such a tokenizer; without those it takes and gives token numbers.
        chat_template: how a chat becomes a prompt, in Jinja.

    Raises:
        ConfigError: `weights` is none of these, llama.cpp has no such Mamba, or numbers are too
            large for their type.
        CheckpointError: the file cannot be written, the tokenizer is broken, or a tensor holds NaN
            or infinity.
        MissingDependencyError: the `gguf` package is not installed.

    Example:
        >>> import tempfile
        >>> from anymamba.checkpoint import expected_shapes
        >>> config = {"vocab_size": 8, "hidden_size": 32, "num_hidden_layers": 1}
        >>> tensors = {n: np.ones(s, np.float32) for n, s in expected_shapes(config).items()}
        >>> file = Path(tempfile.mkdtemp()) / "model.gguf"
        >>> write_gguf(file, config, tensors, weights="q4_0")
        >>> file.read_bytes()[:4]
        b'GGUF'
    """
    shape = _checked(config, weights)
    gguf = import_gguf()

    def write(unfinished: Path) -> None:
        writer = gguf.GGUFWriter(unfinished, arch=architecture_of(config).gguf)
        try:
            _add_settings(writer, config, shape, weights)
            _add_tokenizer(writer, config, shape, tokenizer_json, chat_template)
            _write_tensors(writer, config, shape, tensors, weights)
        except OSError as error:
            if error.errno is None:  # numpy says how much it wrote, and not why it was no more
                _write_in_vain(unfinished)
            raise
        finally:
            writer.close()

    write_atomically(path, write)


def _write_in_vain(file: Path) -> None:
    """Let the system say itself, by an `OSError`, why it takes no more."""
    with file.open("ab") as unfinished:
        unfinished.write(bytes(_PROBE_BYTES))


def _checked(config: Mapping[str, Any], weights: str) -> ModelShape:
    if weights not in GGUF_WEIGHTS:
        raise ConfigError(
            f"weights of a GGUF file must be one of {', '.join(GGUF_WEIGHTS)}, got {weights!r}"
        )
    shape = model_shape(config)
    found = {
        "use_bias": shape.bias,
        "use_conv_bias": shape.conv_bias,
        "hidden_act": config.get("hidden_act", "silu"),
    }
    if architecture_of(config) is MAMBA2:
        found["time_step_limit"] = list(config.get("time_step_limit", _UNLIMITED))
        found["use_gated_norm"] = shape.gated_norm
        found["gate_after_norm"] = config.get("gate_after_norm", False)
    else:
        found["expand"] = shape.d_inner // shape.d_model
    needed = {name: _NEEDED[name] for name in found}
    if found != needed:
        raise ConfigError(
            f"llama.cpp reads {architecture_of(config).name} models with {_spelt(needed)} only, "
            f"and this one has {_spelt(found)}"
        )
    return shape


def _spelt(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={shown(value)}" for name, value in fields.items())


def _add_settings(writer: Any, config: Mapping[str, Any], shape: ModelShape, weights: str) -> None:
    architecture = architecture_of(config)
    writer.add_name(architecture.name)
    writer.add_file_type(_FILE_TYPES[weights])
    if weights.startswith("q"):
        writer.add_quantization_version(2)
    writer.add_context_length(_CONTEXT)
    writer.add_embedding_length(shape.d_model)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(shape.n_layer)
    writer.add_ssm_conv_kernel(shape.d_conv)
    writer.add_ssm_inner_size(shape.d_inner)
    writer.add_ssm_state_size(shape.d_state)
    writer.add_ssm_time_step_rank(shape.heads or shape.dt_rank)
    writer.add_layer_norm_rms_eps(config.get("layer_norm_epsilon", _EPSILON))
    writer.add_vocab_size(shape.vocab_size)
    if shape.heads:
        writer.add_ssm_group_count(shape.groups)
    if architecture.norms_maps:
        writer.add_ssm_dt_b_c_rms(True)
        writer.add_float32(MIXER_EPSILON, config.get("mixer_rms_eps", _MIXER_EPSILON))


def _add_tokenizer(
    writer: Any,
    config: Mapping[str, Any],
    shape: ModelShape,
    text: str | None,
    chat_template: str | None,
) -> None:
    header: dict[str, Any] = {}
    for name in ("bos", "eos", "pad"):
        number = config.get(f"{name}_token_id")
        if type(number) is int and 0 <= number < shape.vocab_size:
            header[f"{'padding' if name == 'pad' else name}_token_id"] = number
    lists = None
    if text:
        tokenizer_from_json(text, "tokenizer.json")  # refuses what is none
        writer.add_string(WHOLE, text)
        lists = llama_tokenizer(text, shape.vocab_size)
    if chat_template:
        writer.add_chat_template(chat_template)
    # "no_vocab" is what llama.cpp calls a file of numbers alone.
    for name, value in (header | (lists or {"model": "no_vocab"})).items():
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
        add.get(type(value), writer.add_array)(PREFIX + name, value)


def _write_tensors(
    writer: Any,
    config: Mapping[str, Any],
    shape: ModelShape,
    tensors: Mapping[str, NDArray[Any]],
    weights: str,
) -> None:
    gguf = import_gguf()
    shapes = architecture_of(config).gguf_shapes(shape)
    dtypes = {}
    for name, stored in shapes.items():
        dtype = dtypes[name] = _dtype(gguf, name, stored, weights)
        if dtype not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            stored = gguf.quant_shape_to_byte_shape(stored, dtype)
        numpy_dtype = np.dtype({"F32": np.float32, "F16": np.float16}.get(dtype.name, np.uint8))
        n_bytes = int(np.prod(stored)) * numpy_dtype.itemsize
        writer.add_tensor_info(to_gguf_name(name), stored, numpy_dtype, n_bytes, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, dtype in dtypes.items():
        values = _values(name, tensors[name], dtype.name).reshape(shapes[name])
        writer.write_tensor_data(gguf.quantize(values, dtype))


def _dtype(gguf: Any, name: str, shape: tuple[int, ...], weights: str) -> Any:
    types = gguf.GGMLQuantizationType
    if not is_matrix(name):
        return types.F32
    wanted = types[weights.upper()]
    return types.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] else wanted


def _values(name: str, tensor: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """A tensor's numbers as GGUF keeps them, before they are rounded to their type."""
    check_finite(name, tensor)
    values = as_float32(tensor)
    if role_of(name) == "decay":
        values = -np.exp(values.astype(np.float64)).astype(np.float32)
    if dtype in ("F16", "Q8_0", "Q4_0"):
        check_fits_float16(name, values, dtype)
    return values
