"""A model's settings, as `mamba_ssm.models.config_mamba` has them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["MambaConfig"]


@dataclass
class MambaConfig:
    """The settings of a `MambaLMHeadModel`: what config.json holds in the original's layout.

    Args:
        d_model: the width.
        d_intermediate: the inner width of an MLP behind each mixer; 0 for none.
        n_layer: how many blocks.
        vocab_size: how many tokens there are.
        ssm_cfg: the mixers' settings; `layer` is "Mamba1" or "Mamba2".
        attn_layer_idx: which blocks have attention for a mixer.
        attn_cfg: its settings, those of `MHA`.
        rms_norm: RMSNorm rather than LayerNorm.
        residual_in_fp32: whether the residual is float32 whatever the weights are.
        fused_add_norm: whether addition and norm are one operator.
        pad_vocab_size_multiple: the embedding table has vocab_size rows rounded up to it.
        tie_embeddings: whether the head is the embedding table.

    Example:
        >>> MambaConfig(d_model=64, ssm_cfg={"layer": "Mamba2"}).tie_embeddings
        True
    """

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] = field(default_factory=dict)
    attn_layer_idx: list[int] = field(default_factory=list)
    attn_cfg: dict[str, Any] = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True
