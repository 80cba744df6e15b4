"""AnyMamba, and the weights that all others get."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from anymamba import MambaCache, MambaConfig, MambaForCausalLM
from common.shapes import Shape
from contenders.interface import TorchContender

__all__ = ["AnyMamba", "AutocastAnyMamba", "random_model"]


def random_model(shape: Shape) -> MambaForCausalLM:
    """A float32 model with the random weights that training would start from."""
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(**shape.as_config()))
    model.train(False)
    # Random weights may say "end of text" at any time; the number of tokens must not depend on it.
    model.generation_config.eos_token_id = None
    return model


class AnyMamba(TorchContender):
    """AnyMamba through its public API.

    Args:
        source: a float32 model.
        dtype: the storage of the weights; in float32 they are the source's own.
    """

    def __init__(self, source: MambaForCausalLM, dtype: torch.dtype = torch.float32) -> None:
        self.model: Any = source
        if dtype is not torch.float32:
            self.model = copy.deepcopy(source)
            self.model.to(dtype)

    @torch.no_grad()
    def prefill(self, ids_bl: Tensor) -> Tensor:
        """Through `forward` with `logits_to_keep`."""
        logits: Tensor = self.model(ids_bl, logits_to_keep=1).logits
        return logits[:, -1]

    @torch.no_grad()
    def decode(self, ids_bl: Tensor) -> Tensor:
        """Through `forward` with a `MambaCache`."""
        cache = MambaCache(self.model.config, ids_bl.shape[0], dtype=self.model.dtype)
        for t in range(ids_bl.shape[1]):
            logits: Tensor = self.model(ids_bl[:, t : t + 1], cache=cache).logits
        return logits[:, -1]

    def generate(self, ids_bl: Tensor, steps: int) -> Tensor:
        """Continue a text greedily through Transformers' `generate`; (b, l + steps)."""
        mask = torch.ones_like(ids_bl)
        written: Tensor = self.model.generate(
            ids_bl, attention_mask=mask, max_new_tokens=steps, do_sample=False
        )
        return written

    def logits(self, ids_bl: Tensor) -> Tensor:
        """Of all positions."""
        logits: Tensor = self.model(ids_bl, use_cache=False).logits
        return logits

    def loss(self, ids_bl: Tensor) -> Tensor:
        """The model's own, from `labels`."""
        loss: Tensor = self.model(ids_bl, labels=ids_bl, use_cache=False).loss
        return loss


class AutocastAnyMamba(AnyMamba):
    """AnyMamba with float32 weights whose products are of bfloat16 numbers."""

    def loss(self, ids_bl: Tensor) -> Tensor:
        """As `anymamba train` computes it where the processor multiplies bfloat16."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().loss(ids_bl)
