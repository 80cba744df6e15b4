"""Mamba-2: `anymamba.modeling.mamba` around another mixer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import nn
from transformers import initialization as init

from anymamba.layers.native import Part
from anymamba.modeling.config import Mamba2Config
from anymamba.modeling.mamba.causal_lm import MambaForCausalLM
from anymamba.modeling.mamba.mixer import MambaMixer
from anymamba.modeling.mamba.model import MambaBlock, MambaModel, MambaPreTrainedModel
from anymamba.modeling.mamba.parts import parts_of
from anymamba.modeling.mamba2.mixer import Mamba2Mixer, MambaRMSNormGated
from anymamba.modeling.mamba2.parts import parts_of_mixer
from anymamba.ops.fusable import fusable


@fusable
class Mamba2Block(MambaBlock):
    """As `MambaBlock`, around a `Mamba2Mixer`."""

    mixer_class = cast("type[MambaMixer]", Mamba2Mixer)


class Mamba2PreTrainedModel(MambaPreTrainedModel):
    """What all Mamba-2 models share: loading from any layout, and how weights start."""

    config_class = Mamba2Config
    _no_split_modules = ["Mamba2Block", "Mamba2Mixer"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MambaRMSNormGated):
            init.ones_(module.weight)


@fusable
class Mamba2Model(Mamba2PreTrainedModel, MambaModel):
    """Embeddings, the stack of Mamba-2 blocks and the final norm: as `MambaModel`.

    Args:
        config: what to build.

    Example:
        >>> import torch
        >>> from anymamba import Mamba2Config, Mamba2Model
        >>> sizes = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2}
        >>> model = Mamba2Model(Mamba2Config(num_heads=4, head_dim=16, n_groups=1, **sizes))
        >>> model(torch.tensor([[1, 2, 3]])).last_hidden_state.shape
        torch.Size([1, 3, 32])
    """

    block_class = Mamba2Block


class Mamba2ForCausalLM(Mamba2PreTrainedModel, MambaForCausalLM):
    """Mamba-2 with a language model's head: as `MambaForCausalLM`.

    Args:
        config: what to build.

    Example:
        >>> import torch
        >>> from anymamba import Mamba2Config, Mamba2ForCausalLM
        >>> sizes = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2}
        >>> model = Mamba2ForCausalLM(Mamba2Config(num_heads=4, head_dim=16, n_groups=1, **sizes))
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 256])
    """

    backbone_class = Mamba2Model

    def fused_parts(self) -> Iterator[Part]:
        """The modules that one call of the native core stands in for."""
        return parts_of(
            self.config, self.backbone, self.lm_head, self.backbone_class, parts_of_mixer
        )
