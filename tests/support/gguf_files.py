"""GGUF files written by the `gguf` package's writer, name by name, and what it reads in them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from anymamba.checkpoint.gguf.reader import read_gguf
from anymamba.errors import CheckpointError
from tests.support import files
from tests.support.files import tensors

COUNTS = {
    "mamba.embedding_length": 32,
    "mamba.block_count": 2,
    "mamba.ssm.conv_kernel": 4,
    "mamba.ssm.inner_size": 64,
    "mamba.ssm.state_size": 5,
    "mamba.ssm.time_step_rank": 3,
}
EPSILON = "mamba.attention.layer_norm_rms_epsilon"
MATRICES = ("token_embd.weight", "ssm_in.weight", "ssm_x.weight", "ssm_out.weight", "output.weight")


def stored_tensors(tied: bool = True) -> dict[str, NDArray[Any]]:
    """The tiny model's weights under GGUF's names, in its forms."""
    ours = tensors(tied)
    stored = {
        "token_embd.weight": ours["backbone.embeddings.weight"],
        "output_norm.weight": ours["backbone.norm_f.weight"],
    }
    if not tied:
        stored["output.weight"] = ours["lm_head.weight"]
    for layer in (0, 1):
        old, new = f"backbone.layers.{layer}.", f"blk.{layer}."
        stored |= {
            new + "attn_norm.weight": ours[old + "norm.weight"],
            new + "ssm_in.weight": ours[old + "mixer.in_proj.weight"],
            new + "ssm_conv1d.weight": ours[old + "mixer.conv1d.weight"][:, 0],
            new + "ssm_conv1d.bias": ours[old + "mixer.conv1d.bias"],
            new + "ssm_x.weight": ours[old + "mixer.x_proj.weight"],
            new + "ssm_dt.weight": ours[old + "mixer.dt_proj.weight"],
            new + "ssm_dt.bias": ours[old + "mixer.dt_proj.bias"],
            new + "ssm_a": -np.exp(ours[old + "mixer.A_log"]),
            new + "ssm_d": ours[old + "mixer.D"],
            new + "ssm_out.weight": ours[old + "mixer.out_proj.weight"],
        }
    return stored


def write(
    path: Path,
    kind: str = "F32",
    stored: dict[str, NDArray[Any]] | None = None,
    architecture: str = "mamba",
    **changes: Any,
) -> Path:
    """A GGUF file. `changes` are values of its header, dots spelt as __; None leaves one out."""
    import gguf

    values: dict[str, Any] = {**COUNTS, EPSILON: 1e-5}
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    writer = gguf.GGUFWriter(path, arch=architecture)
    for name, value in values.items():
        add(writer, name, value)
    for name, value in (stored_tensors() if stored is None else stored).items():
        own = kind if name.endswith(MATRICES) else "F32"
        if name.endswith("ssm_dt.weight"):  # its rows of 3 are no blocks
            own = "F16" if kind.startswith("Q") else kind
        quantization = gguf.GGMLQuantizationType[own]
        writer.add_tensor(name, gguf.quantize(value, quantization), raw_dtype=quantization)
    return finished(writer, path)


def finished(writer: Any, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def blocks(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Any bytes as blocks whose largest values are near 0.05, as in a model."""
    import gguf

    quantization = gguf.GGMLQuantizationType[kind]
    numbers, n_bytes = gguf.GGML_QUANT_SIZES[quantization]
    drawn = rng.integers(0, 256, (4096, n_bytes), np.uint8)
    with np.errstate(all="ignore"):
        largest = np.abs(gguf.dequantize(drawn, quantization)).max(axis=1)
        distance = np.abs(np.log(largest / 0.05))  # NaN is farthest
    usable = drawn[np.argsort(distance)[:256]]
    rows = usable[rng.integers(0, len(usable), shape[0] * shape[1] // numbers)]
    return rows.reshape(shape[0], -1)


WIDE = {"mamba.embedding_length": 256, "mamba.block_count": 1, "mamba.ssm.inner_size": 512}
WIDE_KINDS = {"token_embd.weight": (64, 256), "ssm_in.weight": (1024, 256)}
WIDE_KINDS |= {"ssm_x.weight": (13, 512), "ssm_out.weight": (256, 512)}


def write_wide(path: Path, kind: str, head: str | None = None, parts: int = 0) -> Path:
    """A model whose rows are blocks of 256, with matrices in `kind` and the table in `head`.

    `parts` is how many tensors a part has, if it is to be split.
    """
    import gguf

    rng = np.random.default_rng(3)
    writer = gguf.GGUFWriter(path, arch="mamba", split_max_tensors=parts)
    for name, value in {**COUNTS, **WIDE, EPSILON: 1e-5}.items():
        add(writer, name, value)
    floats = {
        "output_norm.weight": rng.uniform(0.5, 1, 256),
        "blk.0.attn_norm.weight": rng.uniform(0.5, 1, 256),
        "blk.0.ssm_conv1d.weight": rng.normal(0, 0.3, (512, 4)),
        "blk.0.ssm_conv1d.bias": rng.normal(0, 0.3, 512),
        "blk.0.ssm_dt.weight": rng.normal(0, 0.3, (512, 3)),
        "blk.0.ssm_dt.bias": rng.normal(0, 0.3, 512),
        "blk.0.ssm_a": -np.exp(rng.normal(0, 0.3, (512, 5))),
        "blk.0.ssm_d": rng.normal(0, 0.3, 512),
    }
    for name, values in floats.items():
        writer.add_tensor(name, values.astype(np.float32))
    for part, shape in WIDE_KINDS.items():
        is_table = part == "token_embd.weight"
        own = head if head is not None and is_table else kind
        name = part if is_table else f"blk.0.{part}"
        writer.add_tensor(name, blocks(own, shape, rng), raw_dtype=gguf.GGMLQuantizationType[own])
    return finished(writer, path)


def add(writer: Any, name: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    elif value is not None:
        writer.add_array(name, value)


def widened(values: Any) -> Any:
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def by_the_package(path: Path) -> dict[str, Any]:
    """Every tensor as the package itself reads it, in float32."""
    import gguf

    return {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(path).tensors
    }


def lists_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """A tokenizer as llama.cpp's converter writes it."""
    fields = json.loads(tokenizer.to_str())
    added = {token["id"]: token["special"] for token in fields["added_tokens"]}
    size = tokenizer.get_vocab_size()
    return {
        "tokenizer__ggml__model": "gpt2",
        "tokenizer__ggml__pre": "olmo",
        "tokenizer__ggml__tokens": [*map(tokenizer.id_to_token, range(size)), "[PAD]", "[PAD2]"],
        "tokenizer__ggml__token_type": [
            *({None: 1, True: 3, False: 4}[added.get(i)] for i in range(size)),
            *(5, 5),
        ],
        "tokenizer__ggml__merges": [" ".join(pair) for pair in fields["model"]["merges"]],
    }


def refusal(path: Path) -> str:
    """The one line with which a file is refused, which names it."""
    message = files.refusal(CheckpointError, lambda: dict(read_gguf(path).tensors))
    assert path.name in message
    return message
