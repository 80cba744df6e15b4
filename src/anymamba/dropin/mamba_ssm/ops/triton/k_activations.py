"""The gated activation of MLPs."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from anymamba.dropin.dispatch import by_device

__all__ = ["SwiGLU", "swiglu"]


@by_device
def swiglu(xy: Tensor) -> Tensor:
    """silu(x) * y for the two halves x and y of the last axis. Differentiable.

    Args:
        xy: (..., 2 * d).

    Returns:
        (..., d).

    Source: "GLU Variants Improve Transformer" (arXiv 2002.05202), equation 6.

    Example:
        >>> import torch
        >>> from anymamba.dropin.mamba_ssm.ops.triton.k_activations import swiglu
        >>> swiglu(torch.tensor([50.0, 2.0])).tolist()
        [100.0]
    """
    x, y = xy.chunk(2, dim=-1)
    return F.silu(x) * y


class SwiGLU:
    """`swiglu` for programs that call the original's autograd function by its name."""

    apply = staticmethod(swiglu)
