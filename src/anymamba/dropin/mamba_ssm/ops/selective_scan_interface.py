"""The selective scan and the whole inside of a Mamba block, with channels before time.

The operators of `anymamba.ops` do the work, channel-last; this module turns shapes and names. The
letters in comments: b batch, e channels ("dim"), l length, n states ("dstate"), g groups.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from anymamba import ops
from anymamba.dropin.causal_conv1d.causal_conv1d_interface import (
    causal_conv1d_fn,
    causal_conv1d_ref,
)
from anymamba.dropin.common.borrowed import rearrange as rearrange
from anymamba.dropin.common.borrowed import repeat as repeat
from anymamba.dropin.dispatch import by_device
from anymamba.errors import InputError
from anymamba.ops.checks import check_shape

__all__ = [
    "MambaInnerFn",
    "SelectiveScanFn",
    "mamba_inner_fn",
    "mamba_inner_ref",
    "selective_scan_fn",
    "selective_scan_ref",
]

Output = Tensor | tuple[Tensor, Tensor]


@by_device
def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Output:
    """Run the selective state space over sequences. Differentiable in every tensor.

    Args:
        u: the input, (batch, dim, seqlen).
        delta: the step size before bias and softplus, (batch, dim, seqlen).
        A: the rates of decay, (dim, dstate), real with negative numbers, or complex with negative
            real parts.
        B, C: input and output maps: constant (dim, dstate), or variable (batch, dstate, seqlen),
            or variable in groups of neighbouring channels (batch, groups, dstate, seqlen). With a
            complex A, a constant one is complex, and a variable one is real with 2 * seqlen
            numbers, real and imaginary parts in turns.
        D: the skip connection, (dim,).
        z: a gate, (batch, dim, seqlen); the output is multiplied by silu(z).
        delta_bias: added to delta, (dim,).
        delta_softplus: whether delta goes through softplus after the bias.
        return_last_state: whether to return the state after the last step as well. Unlike the
            original's, it has gradients.

    Returns:
        The output, (batch, dim, seqlen) in the type of u, and with return_last_state the last
        state, (batch, dim, dstate) in float32 or complex64.

    Raises:
        InputError: a shape does not fit the others, or B or C is complex and A is not.

    Source: "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752),
    equation 2; complex A: "On the Parameterization and Initialization of Diagonal State Space
    Models" (arXiv 2206.11893), section 3.

    Example:
        >>> u, delta = torch.ones(1, 2, 3), torch.ones(1, 2, 3)
        >>> A, B, C = torch.zeros(2, 4), torch.ones(1, 4, 3), torch.ones(1, 4, 3)
        >>> selective_scan_fn(u, delta, A, B, C)[0, 0].tolist()
        [4.0, 8.0, 12.0]
    """
    inputs = (u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    out, last_state = scan_with_state(*inputs, backend=None)
    return (out, last_state) if return_last_state else out


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Output:
    """`selective_scan_fn` in plain PyTorch."""
    inputs = (u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    out, last_state = scan_with_state(*inputs, backend="reference")
    return (out, last_state) if return_last_state else out


class SelectiveScanFn:
    """`selective_scan_fn` for programs that call the original's autograd function by its name."""

    apply = staticmethod(selective_scan_fn)


@by_device
def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """A Mamba block between its first projection and its output. Differentiable in every tensor.

    Args:
        xz: what the first projection gives: input and gate, (batch, 2 * dim, seqlen).
        conv1d_weight: (dim, 1, width).
        conv1d_bias: (dim,).
        x_proj_weight: gives the step's low-rank form, and B and C where they are variable,
            (delta_rank + 2 * dstate, dim); with a complex A, 4 * dstate in place of 2.
        delta_proj_weight: (dim, delta_rank).
        out_proj_weight, out_proj_bias: the last projection, (d_model, dim) and (d_model,).
        A: (dim, dstate), real or complex.
        B, C: as `selective_scan_fn` takes them; None computes them from the input.
        D, delta_bias: (dim,).
        B_proj_bias, C_proj_bias: added to B and C that are computed from the input, (dstate,).
        delta_softplus: whether the step goes through softplus.
        checkpoint_lvl: 0 or 1, how much the original computes again in its backward pass. Here
            both are the same: nothing but the scan's states is computed again.
        b_rms_weight, c_rms_weight: gains of an RMS norm of B and C, (dstate,).
        dt_rms_weight: gain of an RMS norm of the step before its bias, (dim,).
        b_c_dt_rms_eps: added to the mean squares of these norms.

    Returns:
        (batch, seqlen, d_model).

    Raises:
        InputError: a shape does not fit the others, or a norm is asked for where it cannot be.

    Example:
        >>> out = mamba_inner_fn(
        ...     torch.randn(2, 12, 7), torch.randn(6, 1, 4), None, torch.randn(2 + 3 + 3, 6),
        ...     torch.randn(6, 2), torch.randn(5, 6), None, -torch.rand(6, 3),
        ... )
        >>> out.shape
        torch.Size([2, 7, 5])
    """
    if checkpoint_lvl not in (0, 1):
        raise InputError(f"mamba_inner_fn: checkpoint_lvl is {checkpoint_lvl!r}, expected 0 or 1")
    x, z = _two_halves(xz, conv1d_weight)
    x = cast(Tensor, causal_conv1d_fn(x, conv1d_weight[:, 0], conv1d_bias, activation="silu"))
    biases = (B_proj_bias, C_proj_bias)
    delta, B, C = _steps_and_maps(x, x_proj_weight, delta_proj_weight, A, B, C, biases)
    delta = _normed(delta, dt_rms_weight, b_c_dt_rms_eps)
    B = _normed(B, b_rms_weight, b_c_dt_rms_eps)
    C = _normed(C, c_rms_weight, b_c_dt_rms_eps)
    y = cast(Tensor, selective_scan_fn(x, delta, A, B, C, D, z, delta_bias, delta_softplus))
    return _projected(y, out_proj_weight, out_proj_bias)


def mamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """`mamba_inner_fn` in plain PyTorch, without the norms as in the original."""
    x, z = _two_halves(xz, conv1d_weight)
    x = cast(Tensor, causal_conv1d_ref(x, conv1d_weight[:, 0], conv1d_bias, activation="silu"))
    biases = (B_proj_bias, C_proj_bias)
    delta, B, C = _steps_and_maps(x, x_proj_weight, delta_proj_weight, A, B, C, biases)
    y = cast(Tensor, selective_scan_ref(x, delta, A, B, C, D, z, delta_bias, delta_softplus))
    return _projected(y, out_proj_weight, out_proj_bias)


class MambaInnerFn:
    """`mamba_inner_fn` for programs that call the original's autograd function by its name."""

    apply = staticmethod(mamba_inner_fn)


def scan_with_state(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    backend: str | None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The output and the last state of `selective_scan_fn`, from an earlier state on."""
    if u.ndim != 3 or A.ndim != 2:
        raise InputError(
            "selective_scan_fn: expected u of shape (batch, dim, seqlen) and A of shape "
            f"(dim, dstate), got {tuple(u.shape)} and {tuple(A.shape)}"
        )
    for name, tensor in (("delta", delta), ("z", z)):
        check_shape("selective_scan_fn", name, tensor, tuple(u.shape))
    out, last_state = ops.selective_scan(
        u.mT,
        delta.mT,
        A,
        _channel_last("B", B, u, A),
        _channel_last("C", C, u, A),
        D,
        None if z is None else z.mT,
        delta_bias,
        delta_softplus,
        initial_state=initial_state,
        return_last_state=True,
        backend=backend,
    )
    return out.mT, last_state


def _channel_last(name: str, B: Tensor, u: Tensor, A: Tensor) -> Tensor:
    """B or C in whichever of its forms as (b, l, n) or (b, l, g, n)."""
    (b, e, l), n = u.shape, A.shape[1]
    columns = 2 * l if A.is_complex() else l
    groups = B.shape[1] if B.ndim == 4 else 1
    check_shape("selective_scan_fn", name, B, (e, n), (b, n, columns), (b, groups, n, columns))
    if B.ndim == 2:
        return B.expand(b, l, e, n)
    if A.is_complex():
        wide = B.to(torch.promote_types(B.dtype, torch.float32))
        B = torch.view_as_complex(wide.contiguous().view(*B.shape[:-1], l, 2))
    return B.mT if B.ndim == 3 else B.permute(0, 3, 1, 2)


def _two_halves(xz: Tensor, conv1d_weight: Tensor) -> tuple[Tensor, Tensor]:
    if xz.ndim != 3 or conv1d_weight.ndim != 3 or xz.shape[1] != 2 * conv1d_weight.shape[0]:
        raise InputError(
            "mamba_inner_fn: expected xz of shape (batch, 2 * dim, seqlen) and conv1d_weight of "
            f"shape (dim, 1, width), got {tuple(xz.shape)} and {tuple(conv1d_weight.shape)}"
        )
    x, z = xz.chunk(2, dim=1)
    return x, z


def _steps_and_maps(
    x: Tensor,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    biases: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor, Tensor]:
    """The step size, and B and C where they are not given, as the input has them."""
    rank, n = delta_proj_weight.shape[1], A.shape[1] * (2 if A.is_complex() else 1)
    projected_blr = F.linear(x.mT, x_proj_weight)
    delta = F.linear(projected_blr[..., :rank], delta_proj_weight).mT
    if B is None:
        B = _variable(projected_blr[..., rank : rank + n], biases[0], A)
    if C is None:
        C = _variable(projected_blr[..., projected_blr.shape[2] - n :], biases[1], A)
    return delta, B, C


def _variable(B_bln: Tensor, bias: Tensor | None, A: Tensor) -> Tensor:
    """(b, n, l); with a complex A (b, n, 2 l), where both parts of a number come in a row."""
    if bias is not None:
        B_bln = B_bln + bias.to(B_bln.dtype)
    if not A.is_complex():
        return B_bln.mT
    b, l, n = B_bln.shape
    return B_bln.reshape(b, l, n // 2, 2).transpose(1, 2).flatten(2)


def _normed(B: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMS norm over the channels of (b, n, l), in the type that they came in."""
    if weight is None:
        return B
    if B.ndim != 3:
        raise InputError(
            "mamba_inner_fn: a norm is for B and C that are computed from the input, or given as "
            f"(batch, dstate, seqlen); this one has shape {tuple(B.shape)}: leave out its norm"
        )
    return cast(Tensor, ops.rms_norm(B.mT, weight, eps)).to(B.dtype).mT


def _projected(y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(y.mT, weight, None if bias is None else bias.to(weight.dtype))
