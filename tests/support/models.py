"""Small models with random weights, none of them zero, for the tests of this folder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from anymamba import MambaConfig, MambaForCausalLM

# The contract's tolerance for whole models in float32, for logits of about 1 to 10.
WHOLE_MODEL = 1e-4


def small_model(seed: int = 0, **fields: Any) -> MambaForCausalLM:
    """Two layers, width 24, 61 words, in evaluation mode."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 5}
    model = MambaForCausalLM(MambaConfig(**(sizes | fields)))
    for name, weight in model.named_parameters():
        # Biases start at zero, where a leak through a masked position could hide.
        if name.endswith("bias") and "dt_proj" not in name:
            nn.init.normal_(weight, std=0.5)
    return model.eval()


def talkative_model(**fields: Any) -> MambaForCausalLM:
    """A small model whose greedy text varies and hangs on all that was read: an untied head."""
    model = small_model(tie_word_embeddings=False, **fields)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return model


def words(b: int, l: int, seed: int = 1) -> Tensor:
    """(b, l) random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 61, (b, l), generator=generator)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Hold two results to the whole model's tolerance."""
    actual, expected = actual.detach(), expected.detach()
    assert actual.shape == expected.shape
    if actual.numel():
        bound = WHOLE_MODEL * max(1.0, float(expected.abs().max()))
        assert float((actual - expected).abs().max()) <= bound
