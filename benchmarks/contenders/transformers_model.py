"""Transformers' Mamba, with and without mambapy."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor

from anymamba import MambaForCausalLM
from common.shapes import Shape
from contenders.interface import TorchContender

__all__ = ["Transformers"]


class Transformers(TorchContender):
    """Transformers' `MambaForCausalLM`.

    Args:
        shape: the model's.
        source: whose weights it takes; the memory is shared.
        mambapy: whether its scan is mambapy's parallel one rather than a loop.
    """

    def __init__(self, shape: Shape, source: MambaForCausalLM, mambapy: bool = False) -> None:
        # It tells at every start that CUDA kernels are missing.
        transformers.utils.logging.set_verbosity_error()
        config = transformers.MambaConfig(**shape.as_config(), use_mambapy=mambapy)
        with torch.device("meta"):
            self.model = transformers.MambaForCausalLM(config).eval()
        self.model.load_state_dict(source.state_dict(), assign=True)
        self.model.tie_weights()

    @torch.no_grad()
    def prefill(self, ids_bl: Tensor) -> Tensor:
        """Through `forward` with `logits_to_keep`."""
        logits: Tensor = self.model(ids_bl, logits_to_keep=1).logits
        return logits[:, -1]

    @torch.no_grad()
    def decode(self, ids_bl: Tensor) -> Tensor:
        """Through `forward` with its cache."""
        cache = None
        for t in range(ids_bl.shape[1]):
            out = self.model(ids_bl[:, t : t + 1], cache=cache, use_cache=True)
            cache = out.cache
        logits: Tensor = out.logits[:, -1]
        return logits

    def logits(self, ids_bl: Tensor) -> Tensor:
        """Of all positions."""
        logits: Tensor = self.model(ids_bl, use_cache=False).logits
        return logits

    def loss(self, ids_bl: Tensor) -> Tensor:
        """The model's own, from `labels`."""
        loss: Tensor = self.model(ids_bl, labels=ids_bl, use_cache=False).loss
        return loss
