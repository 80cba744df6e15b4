"""Rotary position embedding, which the original's attention takes from flash_attn.

Source: "RoFormer: Enhanced Transformer with Rotary Position Embedding" (arXiv 2104.09864),
section 3.4.2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from anymamba.errors import ConfigError


class RotaryEmbedding(nn.Module):
    """Turn pairs of channels by an angle that grows with the position.

    Args:
        dim: how many of a head's first channels turn; even.
        base: the slowest pair turns about base times slower than the fastest.
        interleaved: whether a pair is two neighbours, rather than a channel of the first half and
            its counterpart in the second.

    Raises:
        ConfigError: dim is odd.

    Example:
        >>> turn = RotaryEmbedding(2)
        >>> turned = turn(torch.tensor([[[[1.0, 0.0]], [[1.0, 0.0]]]]), torch.tensor([[0, 1]]))
        >>> [round(value, 4) for value in turned.flatten().tolist()]
        [1.0, 0.0, 0.5403, 0.8415]
    """

    def __init__(self, dim: int, base: float = 10000.0, interleaved: bool = False) -> None:
        super().__init__()
        if dim % 2:
            raise ConfigError(f"rotary_emb_dim is {dim}, expected an even number")
        self.dim, self.base, self.interleaved = dim, base, interleaved

    def forward(self, x_blhp: Tensor, positions_bl: Tensor) -> Tensor:
        """Turn the heads' first channels.

        Args:
            x_blhp: queries or keys, (b, l, h, p) with p at least `dim`.
            positions_bl: (b, l), or (1, l) where all rows have the same.

        Returns:
            (b, l, h, p).
        """
        # In float32 whatever the type: half precision cannot tell positions beyond some hundreds.
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float32, device=x_blhp.device)
        angles = positions_bl.float()[..., None, None] * self.base ** -(exponents / self.dim)
        cos, sin = angles.cos(), angles.sin()
        turning, rest = x_blhp.split([self.dim, x_blhp.shape[-1] - self.dim], dim=-1)
        halves = (-1, 2) if self.interleaved else (2, -1)
        pair_axis = -1 if self.interleaved else -2
        first, second = turning.unflatten(-1, halves).unbind(pair_axis)
        turned = torch.stack([first * cos - second * sin, first * sin + second * cos], pair_axis)
        return torch.cat([turned.flatten(-2).to(x_blhp.dtype), rest], dim=-1)
