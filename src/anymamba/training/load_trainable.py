"""The model that training goes on from."""

from __future__ import annotations

import os

import torch
from torch import nn

from anymamba.checkpoint.architecture import role_of
from anymamba.checkpoint.finite import broken_tensor
from anymamba.errors import ConfigError
from anymamba.modeling import MambaForCausalLM, load_causal_lm


def open_trainable(model: str | os.PathLike[str]) -> MambaForCausalLM:
    """A model in float32.

    Args:
        model: a folder or a name on the hub.

    Raises:
        CheckpointError: it is missing or broken, or a weight is NaN or infinite.
        ConfigError: its weights are kept in 8 or 4 bits, which have no gradients.
    """
    found: MambaForCausalLM = load_causal_lm(model, dtype=torch.float32)
    quantization = getattr(found.config, "quantization_config", None)
    if quantization is not None:
        raise ConfigError(
            f"the model {str(model)!r} keeps its weights in {quantization['bits']} bits, which "
            "cannot be trained: give the model that it was made from"
        )
    check_weights(found)
    return found


def check_weights(model: nn.Module) -> None:
    """Refuse a model with NaN or infinity among its weights, before hours go into it.

    Raises:
        CheckpointError: the message names the tensor.
    """
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        broken = ~torch.isfinite(tensor)
        if role_of(name) == "decay":
            broken &= tensor != -torch.inf  # A is zero: the channel remembers for ever
        if broken.any():
            raise broken_tensor(name, int(broken.sum()))
