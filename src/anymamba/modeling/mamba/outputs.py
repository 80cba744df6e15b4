"""What the models return."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils.generic import ModelOutput

from anymamba.modeling.cache import MambaCache


@dataclass
class MambaOutput(ModelOutput):
    """What `MambaModel` returns.

    Attributes:
        last_hidden_state: (b, l, d), after the final norm.
        cache: the state after the last position, where use_cache is set.
        hidden_states: where asked for, n_layer + 1 tensors (b, l, d): what the embeddings and
            then each layer put out. (Transformers' code returns the layers' outputs and then the
            final norm's, against its own documentation.)
    """

    last_hidden_state: Tensor | None = None
    cache: MambaCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class MambaCausalLMOutput(ModelOutput):
    """What `MambaForCausalLM` returns.

    Attributes:
        loss: the mean cross-entropy in nats per predicted token, where labels are given.
        logits: (b, l, v) in float32, or fewer positions with logits_to_keep.
        cache: the state after the last position, where use_cache is set.
        hidden_states: as in `MambaOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: MambaCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
