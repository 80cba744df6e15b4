"""Mamba with Transformers' interface: configuration, layers, model, language model."""

from anymamba.modeling.mamba.causal_lm import MambaForCausalLM
from anymamba.modeling.mamba.mixer import MambaMixer
from anymamba.modeling.mamba.model import MambaBlock, MambaModel, MambaPreTrainedModel, MambaRMSNorm
from anymamba.modeling.mamba.outputs import MambaCausalLMOutput, MambaOutput

__all__ = [
    "MambaBlock",
    "MambaCausalLMOutput",
    "MambaForCausalLM",
    "MambaMixer",
    "MambaModel",
    "MambaOutput",
    "MambaPreTrainedModel",
    "MambaRMSNorm",
]
