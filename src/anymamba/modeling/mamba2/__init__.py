"""Mamba-2 with Transformers' interface: heads that each decay at one rate."""

from anymamba.modeling.mamba2.mixer import Mamba2Mixer, MambaRMSNormGated
from anymamba.modeling.mamba2.model import (
    Mamba2Block,
    Mamba2ForCausalLM,
    Mamba2Model,
    Mamba2PreTrainedModel,
)

__all__ = [
    "Mamba2Block",
    "Mamba2ForCausalLM",
    "Mamba2Mixer",
    "Mamba2Model",
    "Mamba2PreTrainedModel",
    "MambaRMSNormGated",
]
