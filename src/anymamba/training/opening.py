"""The model that training goes on from."""

from __future__ import annotations

import os

import torch

from anymamba.errors import ConfigError
from anymamba.modeling import MambaForCausalLM

__all__ = ["open_trainable"]


def open_trainable(model: str | os.PathLike[str]) -> MambaForCausalLM:
    """A model in float32.

    Args:
        model: a folder or a name on the hub.

    Raises:
        CheckpointError: it is missing or broken.
        ConfigError: its weights are kept in 8 or 4 bits, which have no gradients.
    """
    found: MambaForCausalLM = MambaForCausalLM.from_pretrained(model, dtype=torch.float32)
    quantization = getattr(found.config, "quantization_config", None)
    if quantization is not None:
        raise ConfigError(
            f"the model {str(model)!r} keeps its weights in {quantization['bits']} bits, which "
            "cannot be trained: give the model that it was made from"
        )
    return found
