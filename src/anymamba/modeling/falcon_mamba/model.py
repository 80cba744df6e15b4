"""Falcon-Mamba: Mamba whose mixers norm the step size, B and C, without a gain.

    dt, B, C = split(x_proj(x))        dt, B, C = rms(dt), rms(B), rms(C)        rms(v) = v / |v|

where |v| is the root of v's mean square plus `mixer_rms_eps`, taken in float32. The norm of dt
stands before `dt_proj`, over its r numbers: so do Transformers' PyTorch code and llama.cpp, in
evaluation and in decoding. The fused kernel of `mamba_ssm`, which Transformers calls in training
mode on a GPU, norms behind `dt_proj` instead, over e numbers, which is another function. Here
training computes what evaluation and decoding will.

Source: "Falcon Mamba: The First Competitive Attention-free 7B Language Model", arXiv 2410.05355,
section 2. The classes add nothing else to those of `anymamba.modeling.mamba`.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from anymamba import ops
from anymamba.checkpoint.architecture import FALCON_MAMBA
from anymamba.modeling.config import FalconMambaConfig
from anymamba.modeling.mamba.causal_lm import MambaForCausalLM
from anymamba.modeling.mamba.mixer import MambaMixer
from anymamba.modeling.mamba.model import MambaBlock, MambaModel, MambaPreTrainedModel
from anymamba.ops.fusable import fusable


@fusable
class FalconMambaMixer(MambaMixer):
    """As `MambaMixer`, with norms on what x_proj gives. Arguments as there."""

    def __init__(
        self, config: FalconMambaConfig, layer_idx: int, initialize_mixer_weights: bool = True
    ) -> None:
        super().__init__(config, layer_idx, initialize_mixer_weights)
        self.rms_eps = config.mixer_rms_eps

    def _normed(self, delta: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._norm(delta), self._norm(B), self._norm(C)

    def _norm(self, x: Tensor) -> Tensor:
        return cast(Tensor, ops.rms_norm(x, x.new_ones(x.shape[-1]), self.rms_eps))

    def norm_weights(self) -> dict[str, Tensor]:
        """The gains by the core's names, all of them one."""
        widths = FALCON_MAMBA.norm_widths(self.time_step_rank, self.ssm_state_size)
        return {name: self.D.new_ones(width) for name, width in widths.items()}

    def core_settings(self) -> dict[str, Any]:
        """The epsilon of these norms."""
        return {"mixer_eps": self.rms_eps}


@fusable
class FalconMambaBlock(MambaBlock):
    """As `MambaBlock`, around a `FalconMambaMixer`."""

    mixer_class = FalconMambaMixer


class FalconMambaPreTrainedModel(MambaPreTrainedModel):
    """What all Falcon-Mamba models share."""

    config_class = FalconMambaConfig
    _no_split_modules = ["FalconMambaBlock", "FalconMambaMixer"]  # noqa: RUF012


@fusable
class FalconMambaModel(FalconMambaPreTrainedModel, MambaModel):
    """Embeddings, the stack of Falcon-Mamba blocks and the final norm: as `MambaModel`.

    Args:
        config: what to build.

    Raises:
        MissingDependencyError: the config asks for mambapy, and neither it nor a kernel is there.

    Example:
        >>> import torch
        >>> from anymamba import FalconMambaConfig, FalconMambaModel
        >>> config = FalconMambaConfig(vocab_size=256, hidden_size=32, num_hidden_layers=2)
        >>> FalconMambaModel(config)(torch.tensor([[1, 2, 3]])).last_hidden_state.shape
        torch.Size([1, 3, 32])
    """

    block_class = FalconMambaBlock


class FalconMambaForCausalLM(FalconMambaPreTrainedModel, MambaForCausalLM):
    """Falcon-Mamba with a language model's head: as `MambaForCausalLM`.

    Args:
        config: what to build.

    Raises:
        MissingDependencyError: the config asks for mambapy, and neither it nor a kernel is there.

    Example:
        >>> import torch
        >>> from anymamba import FalconMambaConfig, FalconMambaForCausalLM
        >>> config = FalconMambaConfig(vocab_size=256, hidden_size=32, num_hidden_layers=2)
        >>> FalconMambaForCausalLM(config)(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 256])
    """

    backbone_class = FalconMambaModel
