"""mamba.py: the package mambapy's blocks, between an embedding and a head.

Its own `mambapy.lm` would put them there too, but imports `mamba_ssm`, which needs CUDA.
"""

from __future__ import annotations

import torch
from mambapy.mamba import Mamba, MambaConfig, RMSNorm
from torch import Tensor, nn

from anymamba import MambaForCausalLM
from common.shapes import Shape
from contenders.interface import TorchContender

__all__ = ["MambaPy"]


class _LanguageModel(nn.Module):
    def __init__(self, config: MambaConfig, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, config.d_model)
        self.mamba = Mamba(config)
        self.norm_f = RMSNorm(config.d_model, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False)


class MambaPy(TorchContender):
    """A language model of mambapy's blocks, with its parallel scan.

    Args:
        shape: the model's.
        source: whose weights it takes; the memory is shared.
    """

    def __init__(self, shape: Shape, source: MambaForCausalLM) -> None:
        self._shape = shape
        config = MambaConfig(
            d_model=shape.hidden_size,
            n_layers=shape.num_hidden_layers,
            d_state=shape.state_size,
            expand_factor=shape.expand,
            d_conv=shape.conv_kernel,
            rms_norm_eps=source.config.layer_norm_epsilon,
        )
        with torch.device("meta"):
            self.model = _LanguageModel(config, shape.vocab_size).eval()
        weights = {_its_name(name): value for name, value in source.state_dict().items()}
        self.model.load_state_dict(weights, assign=True)
        if shape.tie_word_embeddings:
            self.model.lm_head.weight = self.model.embedding.weight

    def _hidden(self, ids_bl: Tensor) -> Tensor:
        hidden_bld: Tensor = self.model.mamba(self.model.embedding(ids_bl))
        return hidden_bld

    def _head(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model.lm_head(self.model.norm_f(hidden))
        return logits

    @torch.no_grad()
    def prefill(self, ids_bl: Tensor) -> Tensor:
        """With the head at the last position alone."""
        return self._head(self._hidden(ids_bl)[:, -1])

    @torch.no_grad()
    def decode(self, ids_bl: Tensor) -> Tensor:
        """Through its `step`."""
        batch, inner, k = ids_bl.shape[0], self._shape.inner, self._shape.conv_kernel
        caches = [
            (None, torch.zeros(batch, inner, k - 1)) for _ in range(self._shape.num_hidden_layers)
        ]
        for token_b in ids_bl.T:
            hidden_bd, caches = self.model.mamba.step(self.model.embedding(token_b), caches)
            logits = self._head(hidden_bd)
        return logits

    def logits(self, ids_bl: Tensor) -> Tensor:
        """Of all positions."""
        return self._head(self._hidden(ids_bl))


def _its_name(name: str) -> str:
    name = name.removeprefix("backbone.").replace("embeddings.", "embedding.")
    return f"mamba.{name}" if name.startswith("layers.") else name
