"""GGUF files written by the `gguf` package's writer, name by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .tiny_files import tensors

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
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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
