"""Dropout that the model does not know of.

The paper's model has none, and neither its class here nor Transformers' has a place for it. Where
a small text is read many times it decides the result, so it is put on from outside, as hooks on
what is added to the residual stream, and comes off with no trace in the weights or the config.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import dropout

from anymamba.modeling.mamba import MambaForCausalLM


@contextmanager
def residual_dropout(
    model: MambaForCausalLM, branch: float, embeddings: float = 0.0
) -> Iterator[None]:
    """Drop numbers of what each block adds to the residual stream, while the model trains.

    Args:
        model: whose blocks; in `eval()` nothing is dropped.
        branch: the probability for the mixers' outputs.
        embeddings: the probability for the embeddings' outputs.

    Example:
        >>> import torch
        >>> from anymamba import MambaConfig
        >>> model = MambaForCausalLM(
        ...     MambaConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1)
        ... )
        >>> with residual_dropout(model, 0.5):
        ...     ids = torch.tensor([[1, 2, 3]])
        ...     bool((model(ids).logits == model(ids).logits).all())
        False

    Source: Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from
    Overfitting", 2014; on residual branches as in GPT-2.
    """
    backbone = model.backbone
    places: list[tuple[Any, float]] = [(layer.mixer, branch) for layer in backbone.layers]
    places.append((backbone.embeddings, embeddings))
    handles = [
        module.register_forward_hook(dropping(share)) for module, share in places if share > 0
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def dropping(share: float) -> Any:
    """A hook that drops a share of a module's output while the module trains."""

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return dropout(output, share, training=module.training)

    return hook
