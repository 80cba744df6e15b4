"""The softplus of step sizes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["softplus"]


def softplus(dt: Tensor) -> Tensor:
    """log(1 + exp(dt)), element by element. In the original, Triton code for use in kernels.

    Example:
        >>> import torch
        >>> softplus(torch.tensor([0.0, 50.0])).tolist()
        [0.6931471824645996, 50.0]
    """
    return F.softplus(dt)
