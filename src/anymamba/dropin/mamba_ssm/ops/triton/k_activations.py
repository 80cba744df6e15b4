"""The gated activation of MLPs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from anymamba.dropin.common.gradients import filled, gradients
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
        >>> swiglu(torch.tensor([50.0, 2.0])).tolist()
        [100.0]
    """
    x, y = xy.chunk(2, dim=-1)
    return F.silu(x) * y


class SwiGLU:
    """`swiglu` for programs that call the original's autograd function by its name."""

    apply = staticmethod(swiglu)


@by_device
@torch.no_grad()
def _swiglu_fwd(xy: Tensor, out: Tensor | None = None) -> Tensor | None:
    """The forward pass, into `out` if it is given. Some programs import this name."""
    return filled(out, swiglu(xy))


@by_device
def _swiglu_bwd(
    xy: Tensor,
    dout: Tensor,
    dxy: Tensor | None = None,
    recompute_output: bool = False,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor | None, Tensor | None] | None:
    """The backward pass: the gradient of xy, with recompute_output the output."""
    (y,), (of_xy,) = gradients(swiglu, (xy,), [dout])
    gradient = filled(dxy, of_xy)
    return (gradient, filled(out, y)) if recompute_output else gradient
