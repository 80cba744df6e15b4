"""The specification, `anymamba.minimal`: readable, with no thought of speed."""

from __future__ import annotations

import torch
from torch import Tensor

from anymamba import MambaForCausalLM, minimal
from common.shapes import Shape
from contenders.interface import TorchContender

__all__ = ["Minimal"]


class Minimal(TorchContender):
    """`anymamba.minimal`.

    Args:
        shape: the model's, with a tied head.
        source: whose weights it takes; the memory is shared.
    """

    def __init__(self, shape: Shape, source: MambaForCausalLM) -> None:
        arguments = minimal.ModelArgs(
            d_model=shape.hidden_size,
            n_layer=shape.num_hidden_layers,
            vocab_size=shape.vocab_size,
            d_state=shape.state_size,
            expand=shape.expand,
            d_conv=shape.conv_kernel,
            pad_vocab_size_multiple=1,
        )
        with torch.device("meta"):
            self.model = minimal.Mamba(arguments).eval()
        weights = {
            name.removeprefix("backbone.").replace("embeddings.", "embedding."): value
            for name, value in source.state_dict().items()
        }
        self.model.load_state_dict(weights, assign=True)
        self.model.lm_head.weight = self.model.embedding.weight

    @torch.no_grad()
    def prefill(self, ids_bl: Tensor) -> Tensor:
        """Its parts one by one, for its `forward` would compute all logits."""
        hidden_bld = self.model.embedding(ids_bl)
        for layer in self.model.layers:
            hidden_bld = layer(hidden_bld)
        logits: Tensor = self.model.lm_head(self.model.norm_f(hidden_bld[:, -1]))
        return logits

    def decode(self, ids_bl: Tensor) -> Tensor:
        """It keeps no state: each token reads the whole text again."""
        for length in range(1, ids_bl.shape[1] + 1):
            logits = self.prefill(ids_bl[:, :length])
        return logits

    def logits(self, ids_bl: Tensor) -> Tensor:
        """Of all positions."""
        logits: Tensor = self.model(ids_bl)
        return logits
