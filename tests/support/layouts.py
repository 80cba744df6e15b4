"""Model folders in every layout, whole or in shards, written without the package under test."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.support.files import shapes

# Two layers, no two sizes alike: d 6, e 12, n 5, r 3, k 4, v 16.
TRANSFORMERS_CONFIG: dict[str, Any] = {
    "model_type": "mamba",
    "hidden_size": 6,
    "num_hidden_layers": 2,
    "vocab_size": 16,
    "state_size": 5,
    "time_step_rank": 3,
    "expand": 2,
    "conv_kernel": 4,
    "tie_word_embeddings": True,
}
ORIGINAL_CONFIG: dict[str, Any] = {
    "d_model": 6,
    "n_layer": 2,
    "vocab_size": 13,  # the weights are padded to 16 rows
    "ssm_cfg": {"d_state": 5, "dt_rank": 3},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
}
MINIMAL_CONFIG: dict[str, Any] = {
    "d_model": 6,
    "n_layer": 2,
    "vocab_size": 16,
    "d_state": 5,
    "expand": 2,
    "dt_rank": 3,
    "d_conv": 4,
    "pad_vocab_size_multiple": 8,
    "conv_bias": True,
    "bias": False,
}
CONFIGS = {
    "transformers": TRANSFORMERS_CONFIG,
    "original": ORIGINAL_CONFIG,
    "minimal": MINIMAL_CONFIG,
}


def weights() -> dict[str, torch.Tensor]:
    """Random weights of the model above in Transformers' names."""
    generator = torch.Generator().manual_seed(0)
    named = shapes(TRANSFORMERS_CONFIG).items()
    return {name: torch.randn(shape, generator=generator) for name, shape in named}


def renamed(layout: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors under the names of another layout; its head is the embedding table."""
    if layout == "transformers":
        return dict(tensors)
    names = {name: name.replace("embeddings", "embedding") for name in tensors}
    if layout == "minimal":
        names = {old: new.removeprefix("backbone.") for old, new in names.items()}
    head = {"lm_head.weight": tensors["backbone.embeddings.weight"]}
    return {names[name]: tensor for name, tensor in tensors.items()} | head


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_model(
    folder: Path,
    layout: str = "transformers",
    tensors: dict[str, torch.Tensor] | None = None,
    *,
    pickled: bool = False,
    **changes: Any,
) -> Path:
    """A whole model's folder. `changes` are fields of its config."""
    stored = renamed(layout, weights()) if tensors is None else tensors
    write_config(folder, CONFIGS[layout] | changes)
    if pickled:
        torch.save(stored, folder / "pytorch_model.bin")
    else:
        copies = {name: tensor.clone() for name, tensor in stored.items()}
        save_file(copies, folder / "model.safetensors")
    return folder


def write_shards(folder: Path, *, pickled: bool = False) -> dict[str, str]:
    """The model in two shards with their index, which is returned."""
    write_config(folder, TRANSFORMERS_CONFIG)
    ending, stem = (".bin", "pytorch_model") if pickled else (".safetensors", "model")
    names = list(weights())
    halves = {
        f"{stem}-00001-of-00002{ending}": names[::2],
        f"{stem}-00002-of-00002{ending}": names[1::2],
    }
    for file, half in halves.items():
        shard = {name: weights()[name] for name in half}
        if pickled:
            torch.save(shard, folder / file)
        else:
            save_file(shard, folder / file)
    index = {name: file for file, half in halves.items() for name in half}
    write_index(folder, index)
    return index


def write_index(folder: Path, index: dict[str, str]) -> None:
    stem = (
        "pytorch_model.bin" if next(iter(index.values())).endswith(".bin") else "model.safetensors"
    )
    (folder / f"{stem}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def safetensors_bytes(header: bytes | dict[str, Any], data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data
