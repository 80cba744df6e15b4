"""Falcon-Mamba with Transformers' interface: Mamba with norms on dt, B and C."""

from anymamba.modeling.falcon_mamba.model import (
    FalconMambaBlock,
    FalconMambaForCausalLM,
    FalconMambaMixer,
    FalconMambaModel,
    FalconMambaPreTrainedModel,
)

__all__ = [
    "FalconMambaBlock",
    "FalconMambaForCausalLM",
    "FalconMambaMixer",
    "FalconMambaModel",
    "FalconMambaPreTrainedModel",
]
