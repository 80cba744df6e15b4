"""Configs and weights from a folder or the hub, as `mamba_ssm.utils.hf` has it."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from anymamba.checkpoint import find_weight_files, load_stored_tensors, resolve
from anymamba.checkpoint.io import read_json_object

__all__ = ["load_config_hf", "load_state_dict_hf"]


def load_config_hf(model_name: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a model's config.json.

    Args:
        model_name: a local folder, or a hub id such as `state-spaces/mamba2-130m`.

    Returns:
        What is in it.

    Raises:
        CheckpointError: it is missing or broken.
        HubError: the model cannot be had from the hub.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "config.json").write_text('{"d_model": 64}')
        >>> load_config_hf(folder)
        {'d_model': 64}
    """
    return read_json_object(resolve(model_name, weights=False) / "config.json")


def load_state_dict_hf(
    model_name: str | os.PathLike[str], device: Any = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Read a model's weights. Nothing in the files is run.

    Args:
        model_name: a local folder, or a hub id. `model.safetensors`, its shards,
            `pytorch_model.bin` or its shards, the first of them that is there.
        device: where the tensors go, by default the CPU.
        dtype: the type they get, by default the one they are stored in.

    Returns:
        The tensors by the names they are stored under.

    Raises:
        CheckpointError: files are missing, broken, or would run code.
        HubError: the model cannot be had from the hub.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> torch.save({"D": torch.ones(2)}, folder + "/pytorch_model.bin")
        >>> load_state_dict_hf(folder, dtype=torch.float64)
        {'D': tensor([1., 1.], dtype=torch.float64)}
    """
    tensors = load_stored_tensors(find_weight_files(resolve(model_name)))
    return {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}
