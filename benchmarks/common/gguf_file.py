"""A Mamba as a GGUF file, which is what llama.cpp reads.

The file has no tokenizer: it takes and gives token numbers. llama.cpp knows such files by the
tokenizer's name "no_vocab".
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch

if TYPE_CHECKING:
    from anymamba import MambaForCausalLM

__all__ = ["KINDS", "write_gguf"]

KINDS = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}
# llama.cpp's names of a layer's tensors, by AnyMamba's.
_LAYER = {
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.x_proj.weight": "ssm_x.weight",
    "mixer.dt_proj.weight": "ssm_dt.weight",
    "mixer.dt_proj.bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.out_proj.weight": "ssm_out.weight",
}
_WHOLE = {
    "backbone.embeddings.weight": "token_embd.weight",
    "backbone.norm_f.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
# What llama.cpp computes with in float32, whatever the file's type is.
_ALWAYS_FLOAT32 = ("norm.weight", "ssm_conv1d.weight", ".bias", "ssm_a", "ssm_d")


def write_gguf(model: MambaForCausalLM, path: Path, kind: str = "f32") -> None:
    """Write a model's weights.

    Args:
        model: a model that llama.cpp can express.
        path: the file to write.
        kind: the type of the matrices, one of `KINDS`.

    Raises:
        ValueError: llama.cpp has no such Mamba.
    """
    config = model.config
    if config.expand != 2 or config.use_bias or not config.use_conv_bias:
        raise ValueError("llama.cpp reads Mambas with expand=2, use_bias=False, use_conv_bias=True")
    writer = gguf.GGUFWriter(path, arch="mamba")
    writer.add_name("mamba")
    writer.add_context_length(1 << 20)  # a Mamba has none; llama.cpp refuses to go beyond it
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_inner_size(config.intermediate_size)
    writer.add_ssm_state_size(config.state_size)
    writer.add_ssm_time_step_rank(int(config.time_step_rank))
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    for name, values in _tensors(model):
        _add(writer, name, values, KINDS[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: MambaForCausalLM) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Every tensor in float32 under llama.cpp's name."""
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        values = tensor.detach().float()
        if name.endswith("A_log"):
            values = -torch.exp(values)
        if name.endswith("conv1d.weight"):
            values = values.squeeze(1)
        yield _its_name(name), values.numpy()


def _its_name(name: str) -> str:
    if name in _WHOLE:
        return _WHOLE[name]
    index, _, rest = name.removeprefix("backbone.layers.").partition(".")
    return f"blk.{index}.{_LAYER[rest]}"


def _add(
    writer: gguf.GGUFWriter,
    name: str,
    values: np.ndarray[Any, Any],
    kind: gguf.GGMLQuantizationType,
) -> None:
    if name.endswith(_ALWAYS_FLOAT32):
        kind = gguf.GGMLQuantizationType.F32
    elif values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = gguf.GGMLQuantizationType.F16  # its rows are no whole number of blocks
    writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
