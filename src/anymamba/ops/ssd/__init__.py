"""The state space duality of Mamba-2: a selective scan whose decay is one number a head.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = C_t h_t + D x_t

A name ends in its tensor's shape: b batch, l length, h heads, p width of a head, n state size,
g groups of heads that share B and C. Source: "Transformers are SSMs: Generalized Models and
Efficient Algorithms Through Structured State Space Duality" (arXiv 2405.21060).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from anymamba.errors import InputError
from anymamba.ops.checks import check_shape
from anymamba.ops.segments import segments_of
from anymamba.ops.ssd.custom_operator import CHUNK_STEPS, ssd_blocked
from anymamba.ops.tracing import copy_for_backward

__all__ = ["ssd"]


def ssd(
    x_blhp: Float[Tensor, "b l h p"],
    dt_blh: Float[Tensor, "b l h"],
    A_h: Float[Tensor, " h"],
    B_blgn: Float[Tensor, "b l g n"],
    C_blgn: Float[Tensor, "b l g n"],
    D_h: Float[Tensor, " h"] | Float[Tensor, "h p"] | None = None,
    z_blhp: Float[Tensor, "b l h p"] | None = None,
    dt_bias_h: Float[Tensor, " h"] | None = None,
    dt_softplus: bool = False,
    *,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_states: Float[Tensor, "s h p n"] | None = None,
    return_final_states: bool = False,
    seq_idx: Int[Tensor, "b l"] | None = None,
    cu_seqlens: Int[Tensor, " s1"] | None = None,
    chunk_size: int | None = None,
) -> Float[Tensor, "b l h p"] | tuple[Float[Tensor, "b l h p"], Float[Tensor, "s h p n"]]:
    """Run Mamba-2's state space over sequences. Differentiable in every tensor.

    It is PyTorch code whose time goes into matrix products, on any device.

    Args:
        x_blhp: the input, (b, l, h, p).
        dt_blh: the step size before bias, softplus and limits, (b, l, h).
        A_h: the (negative) rates of decay, (h,).
        B_blgn, C_blgn: input and output maps, (b, l, g, n), each for h / g neighbouring heads.
        D_h: the skip connection, (h,) or (h, p).
        z_blhp: a gate; the output is multiplied by silu(z).
        dt_bias_h: added to dt, (h,).
        dt_softplus: whether dt goes through softplus after the bias.
        dt_limit: the smallest and the largest step size; what lies outside is moved there.
        initial_states: the state before the first step, (b, h, p, n); zeros when None.
        return_final_states: whether to return the state after the last step as well.
        seq_idx: (b, l) integers; the state restarts from zero where they change. Initial and
            final states then belong to the rows.
        cu_seqlens: (s + 1,) offsets of s sequences packed in one row (b is 1). Initial and final
            states then belong to the sequences: (s, h, p, n).
        chunk_size: how many steps one matrix product takes together. Results do not depend on
            it; None is what was measured as fastest.

    Returns:
        y_blhp in the type of x, and with return_final_states the final states, float32 (float64
        for float64 inputs).

    Raises:
        InputError: a shape does not fit the others, or a limit or chunk size makes no sense.

    Example:
        >>> import torch
        >>> from anymamba.ops import ssd
        >>> x, dt = torch.randn(1, 5, 4, 8), torch.rand(1, 5, 4)
        >>> A, B, C = -torch.rand(4), torch.randn(1, 5, 2, 3), torch.randn(1, 5, 2, 3)
        >>> whole, last = ssd(x, dt, A, B, C, return_final_states=True)
        >>> _, state = ssd(x[:, :2], dt[:, :2], A, B[:, :2], C[:, :2], return_final_states=True)
        >>> rest = ssd(x[:, 2:], dt[:, 2:], A, B[:, 2:], C[:, 2:], initial_states=state)
        >>> torch.allclose(whole[:, 2:], rest, atol=1e-5), last.shape
        (True, torch.Size([1, 4, 8, 3]))
    """
    _check(x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h, z_blhp, dt_bias_h)
    b, l, h, p = x_blhp.shape
    steps = CHUNK_STEPS if chunk_size is None else chunk_size
    if steps < 1:
        raise InputError(f"ssd: chunk_size is {chunk_size}, expected a whole number from 1 up")
    segments = segments_of(b, l, seq_idx, cu_seqlens, reverse=False)
    n_states = b if segments is None else segments.n_states
    check_shape("ssd", "initial_states", initial_states, (n_states, h, p, B_blgn.shape[3]))

    wide = torch.promote_types(x_blhp.dtype, torch.float32)
    dt = _step_sizes(dt_blh.to(wide), dt_bias_h, dt_softplus, dt_limit)
    D_hp = D_h[:, None] if D_h is not None and D_h.ndim == 1 else D_h
    initial = copy_for_backward(initial_states)
    y, last = ssd_blocked(x_blhp, dt, A_h, B_blgn, C_blgn, D_hp, initial, segments, steps)
    if z_blhp is not None:
        y = (y * F.silu(z_blhp.to(wide))).to(x_blhp.dtype)
    return (y, last) if return_final_states else y


def _step_sizes(
    dt_blh: Tensor, bias_h: Tensor | None, softplus: bool, limit: tuple[float, float]
) -> Tensor:
    if bias_h is not None:
        dt_blh = dt_blh + bias_h.to(dt_blh.dtype)
    if softplus:
        dt_blh = F.softplus(dt_blh)
    low, high = limit
    if not low <= high:
        raise InputError(f"ssd: dt_limit is {limit}, expected the smaller number first")
    # Softplus is positive already; a clamp would cost its gradient a pass.
    return dt_blh if softplus and limit == (0.0, math.inf) else dt_blh.clamp(low, high)


def _check(
    x_blhp: Tensor,
    dt_blh: Tensor,
    A_h: Tensor,
    B_blgn: Tensor,
    C_blgn: Tensor,
    D_h: Tensor | None,
    z_blhp: Tensor | None,
    dt_bias_h: Tensor | None,
) -> None:
    if x_blhp.ndim != 4 or B_blgn.ndim != 4:
        raise InputError(
            "ssd: expected an input of shape (b, l, h, p) and B of shape (b, l, g, n), "
            f"got {tuple(x_blhp.shape)} and {tuple(B_blgn.shape)}"
        )
    (b, l, h, p), (g, n) = x_blhp.shape, B_blgn.shape[2:]
    check_shape("ssd", "dt", dt_blh, (b, l, h))
    for name, vector in (("A", A_h), ("dt_bias", dt_bias_h)):
        check_shape("ssd", name, vector, (h,))
    for name, tensor in (("B", B_blgn), ("C", C_blgn)):
        check_shape("ssd", name, tensor, (b, l, g, n))
    if g < 1 or h % g:
        raise InputError(f"ssd: B and C have {g} groups, which do not divide h={h}")
    check_shape("ssd", "D", D_h, (h,), (h, p))
    check_shape("ssd", "z", z_blhp, (b, l, h, p))
