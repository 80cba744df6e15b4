"""Mamba with the API of Hugging Face Transformers."""

from anymamba.modeling.auto import load_causal_lm
from anymamba.modeling.cache import MambaCache
from anymamba.modeling.config import FalconMambaConfig, Mamba2Config, MambaConfig
from anymamba.modeling.falcon_mamba import (
    FalconMambaForCausalLM,
    FalconMambaModel,
    FalconMambaPreTrainedModel,
)
from anymamba.modeling.generation import why_not_native_loop
from anymamba.modeling.mamba import (
    MambaCausalLMOutput,
    MambaForCausalLM,
    MambaModel,
    MambaOutput,
    MambaPreTrainedModel,
)
from anymamba.modeling.mamba2 import Mamba2ForCausalLM, Mamba2Model, Mamba2PreTrainedModel
from anymamba.modeling.registration import register, unregister

__all__ = [
    "FalconMambaConfig",
    "FalconMambaForCausalLM",
    "FalconMambaModel",
    "FalconMambaPreTrainedModel",
    "Mamba2Config",
    "Mamba2ForCausalLM",
    "Mamba2Model",
    "Mamba2PreTrainedModel",
    "MambaCache",
    "MambaCausalLMOutput",
    "MambaConfig",
    "MambaForCausalLM",
    "MambaModel",
    "MambaOutput",
    "MambaPreTrainedModel",
    "load_causal_lm",
    "register",
    "unregister",
    "why_not_native_loop",
]
