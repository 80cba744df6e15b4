"""A layer with its norm and residual, as `mamba_ssm.modules.block` has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from anymamba.dropin.forks import explained
from anymamba.dropin.mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn
from anymamba.errors import ConfigError

__all__ = ["Block"]


class Block(nn.Module):
    """Add the residual, norm, mix; with an MLP, once more for that.

    The sum is returned beside the mixer's output instead of being added to it, so that the next
    block can fuse that addition with its norm.

    Args:
        dim: the width.
        mixer_cls: makes the mixer from the width.
        mlp_cls: makes the feed-forward layer from the width; `nn.Identity` for none.
        norm_cls: makes a norm from the width: `nn.LayerNorm` or the original's `RMSNorm`.
        fused_add_norm: whether addition and norm are one operator.
        residual_in_fp32: whether the residual is kept in float32 whatever the weights are.

    Raises:
        ConfigError: another norm than those two was to be fused.

    Example:
        >>> from anymamba.dropin.mamba_ssm.modules.mamba_simple import Mamba
        >>> block = Block(16, Mamba, nn.Identity)
        >>> output, residual = block(torch.randn(2, 5, 16))
        >>> output.shape, residual.shape
        (torch.Size([2, 5, 16]), torch.Size([2, 5, 16]))
    """

    @explained
    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        mlp_cls: Callable[[int], nn.Module],
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        self.residual_in_fp32 = residual_in_fp32
        self.fused_add_norm = fused_add_norm
        self.norm = norm_cls(dim)
        self.mixer = mixer_cls(dim)
        self.mlp: nn.Module | None = None
        if mlp_cls is not nn.Identity:
            self.norm2 = norm_cls(dim)
            self.mlp = mlp_cls(dim)
        if fused_add_norm and not isinstance(self.norm, nn.LayerNorm | RMSNorm):
            raise ConfigError(
                f"fused_add_norm goes with LayerNorm and RMSNorm, got {type(self.norm).__name__}; "
                "pass fused_add_norm=False"
            )

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        inference_params: Any = None,
        **mixer_kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Run the block.

        Args:
            hidden_states: what the block before returned first, (b, l, d).
            residual: what it returned second; None in the first block.
            inference_params, mixer_kwargs: passed on to the mixer.

        Returns:
            The output, (b, l, d), and the residual that is still to be added to it.
        """
        normed, residual = add_norm(self, self.norm, hidden_states, residual)
        hidden_states = self.mixer(normed, inference_params=inference_params, **mixer_kwargs)
        if self.mlp is not None:
            normed, residual = add_norm(self, self.norm2, hidden_states, residual)
            hidden_states = self.mlp(normed)
        return hidden_states, residual

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        """The mixer's states for a generation; see the mixer."""
        mixer: Any = self.mixer
        return mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)


def add_norm(
    settings: Any, norm: Any, hidden_states: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Add the residual, if any, and norm the sum; return that in the norm's type, and the sum.

    `settings` is a block or a model, which says `fused_add_norm` and `residual_in_fp32`.
    """
    if settings.fused_add_norm:
        both = layer_norm_fn(
            hidden_states,
            norm.weight,
            norm.bias,
            residual=residual,
            prenorm=True,
            residual_in_fp32=settings.residual_in_fp32,
            eps=norm.eps,
            is_rms_norm=isinstance(norm, RMSNorm),
        )
        return cast("tuple[Tensor, Tensor]", both)
    total = hidden_states if residual is None else hidden_states + residual
    normed = norm(total.to(norm.weight.dtype))
    return normed, total.to(torch.float32) if settings.residual_in_fp32 else total
