"""From a model's architecture to the classes that build it."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from anymamba.modeling.config import FalconMambaConfig, Mamba2Config, MambaConfig, StateSpaceConfig
from anymamba.modeling.falcon_mamba import (
    FalconMambaForCausalLM,
    FalconMambaModel,
    FalconMambaPreTrainedModel,
)
from anymamba.modeling.loading.find import find_model
from anymamba.modeling.mamba import MambaForCausalLM, MambaModel, MambaPreTrainedModel
from anymamba.modeling.mamba2 import Mamba2ForCausalLM, Mamba2Model, Mamba2PreTrainedModel


class Classes(NamedTuple):
    """What builds the models of an architecture."""

    config: type[StateSpaceConfig]
    pretrained: type[MambaPreTrainedModel]
    model: type[MambaModel]
    causal_lm: type[MambaForCausalLM]


CLASSES = {
    "mamba": Classes(MambaConfig, MambaPreTrainedModel, MambaModel, MambaForCausalLM),
    "falcon_mamba": Classes(
        FalconMambaConfig, FalconMambaPreTrainedModel, FalconMambaModel, FalconMambaForCausalLM
    ),
    "mamba2": Classes(Mamba2Config, Mamba2PreTrainedModel, Mamba2Model, Mamba2ForCausalLM),
}
"""The classes of each architecture, by the `model_type` of its config."""


def load_causal_lm(name: str | os.PathLike[str], **kwargs: Any) -> MambaForCausalLM:
    """Load a language model, whatever architecture it has.

    Args:
        name, **kwargs: as `MambaForCausalLM.from_pretrained` takes them.

    Returns:
        The model, in evaluation mode.

    Raises:
        AnyMambaError: as `MambaForCausalLM.from_pretrained` raises.

    Example:
        >>> from anymamba.assets import bundled_model
        >>> type(load_causal_lm(bundled_model())).__name__
        'MambaForCausalLM'
    """
    left = dict(kwargs)
    found = find_model(name, left)
    causal_lm = CLASSES[found.config.get("model_type", "mamba")].causal_lm
    return causal_lm.from_pretrained(name, _found=found, **left)


def new_causal_lm(config: StateSpaceConfig) -> MambaForCausalLM:
    """A language model with initial weights.

    Args:
        config: of any architecture.

    Example:
        >>> config = FalconMambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1)
        >>> type(new_causal_lm(config)).__name__
        'FalconMambaForCausalLM'
    """
    return CLASSES[config.model_type].causal_lm(config)  # type: ignore[arg-type]
