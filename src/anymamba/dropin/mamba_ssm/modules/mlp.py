"""The gated feed-forward layer, as `mamba_ssm.modules.mlp` has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anymamba.dropin.forks import explained
from anymamba.ops.fusable import project

__all__ = ["GatedMLP"]


class GatedMLP(nn.Module):
    """fc2(u * activation(gate)), where u and gate are the halves of fc1(x).

    Args:
        in_features: the width of the input.
        hidden_features: the inner width, by default 8/3 of the input's; rounded up to a multiple
            of `multiple_of`.
        out_features: the width of the output, by default the input's.
        activation: applied to the gate.
        bias: whether both projections have one.
        multiple_of: see hidden_features.
        device, dtype: of the weights.

    Source: "GLU Variants Improve Transformer" (arXiv 2002.05202), equation 6.

    Example:
        >>> layer = GatedMLP(16)
        >>> layer.fc2.in_features, layer(torch.randn(2, 3, 16)).shape
        (128, torch.Size([2, 3, 16]))
    """

    @explained
    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[[Tensor], Tensor] = F.silu,
        bias: bool = False,
        multiple_of: int = 128,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = int(8 * in_features / 3) if hidden_features is None else hidden_features
        hidden += -hidden % multiple_of
        out = in_features if out_features is None else out_features
        self.fc1 = nn.Linear(in_features, 2 * hidden, bias=bias, device=device, dtype=dtype)
        self.activation = activation
        self.fc2 = nn.Linear(hidden, out, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer.

        Args:
            x: (..., in_features).

        Returns:
            (..., out_features).
        """
        u, gate = project(self.fc1, x).chunk(2, dim=-1)
        return project(self.fc2, u * self.activation(gate))
