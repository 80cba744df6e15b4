"""Mamba with the API of Hugging Face Transformers."""

from anymamba.modeling.cache import MambaCache
from anymamba.modeling.config import MambaConfig
from anymamba.modeling.generation.loop import why_not_native_loop
from anymamba.modeling.mamba.causal_lm import MambaForCausalLM
from anymamba.modeling.mamba.model import MambaModel, MambaPreTrainedModel
from anymamba.modeling.mamba.outputs import MambaCausalLMOutput, MambaOutput
from anymamba.modeling.registration import register, unregister

__all__ = [
    "MambaCache",
    "MambaCausalLMOutput",
    "MambaConfig",
    "MambaForCausalLM",
    "MambaModel",
    "MambaOutput",
    "MambaPreTrainedModel",
    "register",
    "unregister",
    "why_not_native_loop",
]
