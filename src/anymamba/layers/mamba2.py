"""Mamba-2's layer between its two projections: heads that each decay at one rate.

The letters: b batch, l length, h heads, p channels of a head, g groups of heads that share B and C,
n states. Source: "Transformers are SSMs: Generalized Models and Efficient Algorithms Through
Structured State Space Duality" (arXiv 2405.21060), section 7.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class HeadSizes:
    """The sizes of a Mamba-2 layer, and how they cut what its modules return.

    Attributes:
        heads, headdim, groups, states: h, p, g and n; groups divide the heads.

    Example:
        >>> sizes = HeadSizes(heads=2, headdim=4, groups=1, states=3)
        >>> sizes.width, sizes.convolved
        (8, 14)
    """

    heads: int
    headdim: int
    groups: int
    states: int

    @property
    def width(self) -> int:
        """The channels of all heads, h p."""
        return self.heads * self.headdim

    @property
    def convolved(self) -> int:
        """The channels that the convolution sees: x, B and C."""
        return self.width + 2 * self.groups * self.states

    @property
    def projected(self) -> int:
        """What the layer's first projection gives, without an MLP: z, x, B, C and dt."""
        return self.width + self.convolved + self.heads

    def split_projection(self, zxbcdt: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Both halves of a gated MLP if there is one, then z, x with B and C, and dt."""
        parts = [self.width, self.convolved, self.heads]
        mlp, z, xBC, dt = zxbcdt.split([zxbcdt.shape[-1] - self.projected, *parts], dim=-1)
        return mlp, z, xBC, dt

    def split_convolved(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., h, p), B and C (..., g, n)."""
        maps, shape = self.groups * self.states, (self.groups, self.states)
        x, B, C = xBC.split([self.width, maps, maps], dim=-1)
        x = x.unflatten(-1, (self.heads, self.headdim))
        return x, B.unflatten(-1, shape), C.unflatten(-1, shape)


def mix_heads(
    zxbcdt: Tensor,
    sizes: HeadSizes,
    convolve: Callable[[Tensor], Tensor],
    scan: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor],
    norm: Callable[[Tensor, Tensor], Tensor] | None,
) -> Tensor:
    """A Mamba-2 layer between in_proj and out_proj, over whole sequences or for one step.

    Args:
        zxbcdt: what in_proj gives, (..., 2 m + 2 h p + 2 g n + h): the gate and the input of an MLP
            of width m, which may be 0, then z, x, B, C and dt.
        sizes: h, p, g and n.
        convolve: the convolution with its activation, of (..., h p + 2 g n).
        scan: the state space, of x (..., h, p), dt (..., h), B and C (..., g, n) and the gate like
            x, which is None where the norm applies it; returns the shape of x.
        norm: of the scan's output and the gate z, both (..., h p); None gates without a norm.

    Returns:
        (..., m + h p).
    """
    mlp, z, xBC, dt = sizes.split_projection(zxbcdt)
    x, B, C = sizes.split_convolved(convolve(xBC))
    gate = z.unflatten(-1, (sizes.heads, sizes.headdim)) if norm is None else None
    y = scan(x, dt, B, C, gate).flatten(-2)
    if norm is not None:
        y = norm(y, z)
    if mlp.shape[-1]:
        gate_of_mlp, up = mlp.chunk(2, dim=-1)
        y = torch.cat([F.silu(gate_of_mlp) * up, y], dim=-1)
    return y
