"""What a benchmark can ask of every implementation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Contender", "TorchContender"]


class Contender(ABC):
    """A Mamba language model that reads and continues."""

    @abstractmethod
    def prefill(self, ids_bl: Tensor) -> Tensor:
        """Read a text at once; the logits of the last position, (b, v)."""

    @abstractmethod
    def decode(self, ids_bl: Tensor) -> Tensor:
        """Read a text token by token, from an empty state; the last logits, (b, v)."""


class TorchContender(Contender):
    """One that is a PyTorch module and can be trained."""

    model: Any

    @abstractmethod
    def logits(self, ids_bl: Tensor) -> Tensor:
        """The logits of all positions, (b, l, v), differentiable."""

    def loss(self, ids_bl: Tensor) -> Tensor:
        """The mean cross-entropy of the next token."""
        logits_blv = self.logits(ids_bl)
        return F.cross_entropy(logits_blv[:, :-1].flatten(0, 1), ids_bl[:, 1:].flatten())

    def train_step(self, ids_bl: Tensor) -> Tensor:
        """Forward and backward; the loss."""
        loss = self.loss(ids_bl)
        torch.autograd.backward(loss)
        return loss

    def forget_gradients(self) -> None:
        """As an optimizer's `zero_grad` does."""
        module: nn.Module = self.model
        module.zero_grad(set_to_none=True)
