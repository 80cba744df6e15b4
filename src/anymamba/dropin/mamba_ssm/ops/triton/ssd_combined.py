"""Mamba-2's scan, alone and with all that stands around it in a layer.

Shapes are spelled out as (batch, seqlen, nheads, headdim) and so on; dim is nheads times headdim.
Source: "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State
Space Duality" (arXiv 2405.21060).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from anymamba import ops
from anymamba.dropin.chunk_scan_passes import (
    _mamba_chunk_scan_combined_bwd as _mamba_chunk_scan_combined_bwd,
)
from anymamba.dropin.chunk_scan_passes import (
    _mamba_chunk_scan_combined_fwd as _mamba_chunk_scan_combined_fwd,
)
from anymamba.dropin.common.ssd_parts import (
    ANY_SIZE,
    NO_LIMIT,
    convolution_of,
    norm_of,
    project_out,
    restart_at,
    sizes_of,
    step_sizes,
    width_of_a_head,
    with_padding,
)
from anymamba.dropin.dispatch import by_device
from anymamba.errors import InputError
from anymamba.layers import HeadSizes, mix_heads
from anymamba.ops.checks import check_shape
from anymamba.ops.ssd.reference import ssd_sequential

__all__ = [
    "MambaChunkScanCombinedFn",
    "MambaSplitConv1dScanCombinedFn",
    "mamba_chunk_scan",
    "mamba_chunk_scan_combined",
    "mamba_conv1d_scan_ref",
    "mamba_split_conv1d_scan_combined",
    "mamba_split_conv1d_scan_ref",
    "ssd_chunk_scan_combined_ref",
    "ssd_selective_scan",
]


@by_device
def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Run Mamba-2's state space over sequences. Differentiable in every tensor.

    Args:
        x: (batch, seqlen, nheads, headdim).
        dt: the step size before bias, softplus and limits, (batch, seqlen, nheads).
        A: the rates of decay, (nheads,).
        B, C: (batch, seqlen, ngroups, dstate).
        chunk_size: ignored, as results do not depend on it: CPUs and GPUs have different best ones.
        D: (nheads,) or (nheads, headdim).
        z: a gate like x; the output is multiplied by silu(z).
        dt_bias: (nheads,).
        initial_states: (batch, nheads, headdim, dstate).
        seq_idx: (batch, seqlen) integers: the state restarts from zero where they change.
        cu_seqlens: the offsets of the sequences packed in the only row, (sequences + 1,). Used only
            with return_varlen_states, and does not restart anything: seq_idx does. What stands
            behind the last offset is padding.
        dt_softplus: whether dt goes through softplus.
        dt_limit: the smallest and the largest step size.
        return_final_states: whether to return each row's last state too.
        return_varlen_states: whether to return, after that, the last state of each packed
            sequence, each run from zero. Has gradients, which the original does not offer.

    Returns:
        The output like x; then float32 states as asked for, (batch, nheads, headdim, dstate) and
        (sequences, nheads, headdim, dstate).

    Raises:
        InputError: a shape does not fit the others, or cu_seqlens is missing.

    Example:
        >>> x, dt, A = torch.ones(1, 3, 1, 2), torch.ones(1, 3, 1), torch.zeros(1)
        >>> B = C = torch.ones(1, 3, 1, 4)
        >>> mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=256)[0, :, 0, 0].tolist()
        [4.0, 8.0, 12.0]
    """
    scan = partial(
        ops.ssd,
        *(x, dt, A, B, C, D, z, dt_bias, dt_softplus),
        dt_limit=dt_limit,
        return_last_state=True,
    )
    if not return_varlen_states:
        out, final_states = scan(seq_idx=seq_idx, initial_state=initial_states)
        return (out, final_states) if return_final_states else out
    if cu_seqlens is None:
        raise InputError("mamba_chunk_scan_combined: return_varlen_states needs cu_seqlens")
    offsets = with_padding(cu_seqlens, x.shape[1])
    out, states = scan(cu_seqlens=offsets)
    final_states, varlen_states = states[-1:], states[: len(cu_seqlens) - 1]
    if initial_states is not None or not restart_at(seq_idx, offsets):
        out, final_states = scan(seq_idx=seq_idx, initial_state=initial_states)
    return (out, final_states, varlen_states) if return_final_states else (out, varlen_states)


@by_device
def mamba_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """Run Mamba-2's state space over whole rows. Differentiable in every tensor.

    Args:
        x, dt, A, B, C, chunk_size, D, z, dt_bias, dt_softplus: as in `mamba_chunk_scan_combined`.
            Without softplus, a negative dt counts as it is.

    Returns:
        The output like x.

    Example:
        >>> x, dt, A = torch.ones(1, 3, 1, 2), torch.ones(1, 3, 1), torch.zeros(1)
        >>> B = C = torch.ones(1, 3, 1, 4)
        >>> mamba_chunk_scan(x, dt, A, B, C, chunk_size=256)[0, :, 0, 0].tolist()
        [4.0, 8.0, 12.0]
    """
    y = ops.ssd(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit=ANY_SIZE)
    assert isinstance(y, Tensor)
    return y


def ssd_chunk_scan_combined_ref(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """`mamba_chunk_scan`, whose arguments these are, step by step: slow, for comparison.

    Example:
        >>> x, dt, A = torch.ones(1, 3, 1, 2), torch.ones(1, 3, 1), torch.zeros(1)
        >>> B = C = torch.ones(1, 3, 1, 4)
        >>> ssd_chunk_scan_combined_ref(x, dt, A, B, C, chunk_size=256)[0, :, 0, 0].tolist()
        [4.0, 8.0, 12.0]
    """
    steps = step_sizes(dt, dt_bias, dt_softplus)
    D = D[:, None] if D is not None and D.ndim == 1 else D
    y, _ = ssd_sequential(x, steps, A, B, C, D, None, None)
    return y if z is None else (y * F.silu(z)).to(x.dtype)


@by_device
def ssd_selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
) -> Tensor:
    """The scan with steps and decays of its own for each channel, by Mamba-1's kernels.

    Args:
        x, B, C, D, z, dt_softplus, dt_limit: as in `mamba_chunk_scan_combined`.
        dt: (batch, seqlen, nheads) or (batch, seqlen, nheads, headdim).
        A: (nheads,) or (dim, dstate).
        dt_bias: (nheads,) or (nheads, headdim).

    Returns:
        The output like x.

    Raises:
        InputError: a shape does not fit the others.

    Example:
        >>> x, dt, A = torch.ones(1, 3, 1, 2), torch.ones(1, 3, 1), torch.zeros(1)
        >>> B = C = torch.ones(1, 3, 1, 4)
        >>> ssd_selective_scan(x, dt, A, B, C)[0, :, 0, 0].tolist()
        [4.0, 8.0, 12.0]
    """
    # b batch, l length, h heads, p channels of a head
    b, l, h, p = x.shape
    check_shape("ssd_selective_scan", "dt", dt, (b, l, h), (b, l, h, p))

    def each_channel(tensor: Tensor | None, axis: int) -> Tensor | None:
        """Heads at the axis, and channels of a head behind it or not yet, as one axis."""
        if tensor is None:
            return None
        wide = tensor if tensor.ndim > axis + 1 else tensor[..., None].expand(*tensor.shape, p)
        return wide.flatten(axis)

    steps, bias = each_channel(dt, 2), each_channel(dt_bias, 0)
    assert steps is not None
    if dt_limit != NO_LIMIT:
        steps = step_sizes(steps, bias, dt_softplus, dt_limit).to(x.dtype)
        bias, dt_softplus = None, False
    A = A.to(torch.promote_types(A.dtype, torch.float32))
    rates = A if A.ndim == 2 else A.repeat_interleave(p)[:, None]
    y = ops.selective_scan(
        x.flatten(2),
        steps,
        rates.expand(-1, B.shape[-1]),
        B,
        C,
        each_channel(D, 0),
        None if z is None else z.flatten(2),
        bias,
        dt_softplus,
    )
    assert isinstance(y, Tensor)
    return y.view(x.shape)


@by_device
def mamba_conv1d_scan_ref(
    xBC: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt: Tensor,
    A: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    activation: str | None = "silu",
    headdim: int | None = None,
    ngroups: int = 1,
) -> Tensor:
    """Convolve, split into x, B and C, and scan by Mamba-1's kernels: for comparison.

    Args:
        xBC: (batch, seqlen, dim + 2 * ngroups * dstate).
        conv1d_weight, conv1d_bias: (dim + 2 * ngroups * dstate, width) and the same without width.
        dt, A, D, dt_bias, dt_softplus, dt_limit: as in `ssd_selective_scan`.
        chunk_size: ignored.
        z: a gate, (batch, seqlen, dim).
        activation: None, "silu" or "swish".
        headdim: needed where neither z nor a D of two axes tells it.
        ngroups: of B and C.

    Returns:
        (batch, seqlen, dim).

    Raises:
        InputError: the width of a head cannot be told.

    Example:
        >>> xBC, dt, A = torch.ones(1, 3, 2 + 4 + 4), torch.ones(1, 3, 1), torch.zeros(1)
        >>> weight = torch.ones(10, 1)
        >>> out = mamba_conv1d_scan_ref(
        ...     xBC, weight, None, dt, A, 256, activation=None, headdim=2
        ... )
        >>> out[0, :, 0].tolist()
        [4.0, 8.0, 12.0]
    """
    nheads = dt.shape[2]
    headdim = headdim if z is None else z.shape[-1] // nheads
    headdim = width_of_a_head("mamba_conv1d_scan_ref", D, headdim)
    states = (xBC.shape[-1] - nheads * headdim) // (2 * ngroups)
    convolution = convolution_of(conv1d_weight, conv1d_bias, None, activation)
    sizes = HeadSizes(nheads, headdim, ngroups, states)
    x, B, C = sizes.split_convolved(convolution(xBC))
    gate = None if z is None else z.unflatten(-1, (nheads, headdim))
    steps = dt.to(x.dtype)
    y: Tensor = ssd_selective_scan(x, steps, A, B, C, D, gate, dt_bias, dt_softplus, dt_limit)
    return y.flatten(2)


@by_device
def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = NO_LIMIT,
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """All of a Mamba-2 layer behind its input projection. Differentiable in every tensor.

    Args:
        zxbcdt: the projection's output, (batch, seqlen, 2 * d_mlp + 2 * dim + 2 * ngroups * dstate
            + nheads): the gate and the input of an MLP if d_mlp > 0, then z, x, B, C and dt.
        conv1d_weight, conv1d_bias: (dim + 2 * ngroups * dstate, width) and the same without width.
        dt_bias, A: (nheads,).
        D: (nheads,) or (nheads, headdim).
        chunk_size, initial_states, seq_idx, dt_limit: as in `mamba_chunk_scan_combined`. dt goes
            through softplus.
        return_final_states: whether to return each row's last state too.
        activation: of the convolution: None, "silu" or "swish".
        rmsnorm_weight: (dim,); None gates without a norm.
        rmsnorm_eps: keeps the norm from dividing by zero. Each group is normed by itself.
        outproj_weight, outproj_bias: (out_dim, d_mlp + dim) and (out_dim,); None leaves them out.
        headdim: needed where D has one axis.
        ngroups: of B, C and the norm.
        norm_before_gate: RMSNorm(y) * silu(z) if true, RMSNorm(y * silu(z)) if not.

    Returns:
        (batch, seqlen, out_dim), or (batch, seqlen, d_mlp + dim) without outproj_weight; with
        return_final_states also (batch, nheads, headdim, dstate) in float32.

    Raises:
        InputError: a shape does not fit the others, or headdim is missing.

    Example:
        >>> zxbcdt = torch.ones(1, 3, 2 * 2 + 2 * 4 + 1)
        >>> weight, one = torch.ones(10, 1), torch.ones(1)
        >>> out = mamba_split_conv1d_scan_combined(
        ...     zxbcdt, weight, None, one, -one, one, 256, headdim=2
        ... )
        >>> out.shape
        torch.Size([1, 3, 2])
    """
    name = "mamba_split_conv1d_scan_combined"
    sizes = sizes_of(name, zxbcdt, conv1d_weight, D, headdim, ngroups)
    final_states = []

    def scan(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, gate: Tensor | None) -> Tensor:
        y, last = ops.ssd(
            *(x, dt, A, B, C, D, gate, dt_bias, True),
            dt_limit=dt_limit,
            initial_state=initial_states,
            return_last_state=True,
            seq_idx=seq_idx,
        )
        final_states.append(last)
        return y

    check_shape(name, "rmsnorm_weight", rmsnorm_weight, (sizes.width,))
    norm = norm_of(rmsnorm_weight, rmsnorm_eps, sizes.width // ngroups, norm_before_gate)
    convolution = convolution_of(conv1d_weight, conv1d_bias, seq_idx, activation)
    out = mix_heads(zxbcdt, sizes, convolution, scan, norm)
    out = project_out(name, out, outproj_weight, outproj_bias)
    return (out, final_states[0]) if return_final_states else out


@by_device
def mamba_split_conv1d_scan_ref(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    dt_limit: tuple[float, float] = NO_LIMIT,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor:
    """`mamba_split_conv1d_scan_combined` by Mamba-1's kernels: for comparison.

    All arguments are as there, without an MLP. As in the original, the norm takes all groups
    together.

    Example:
        >>> zxbcdt = torch.ones(1, 3, 2 * 2 + 2 * 4 + 1)
        >>> weight, one = torch.ones(10, 1), torch.ones(1)
        >>> mamba_split_conv1d_scan_ref(
        ...     zxbcdt, weight, None, one, -one, one, 256, headdim=2
        ... ).shape
        torch.Size([1, 3, 2])
    """
    name = "mamba_split_conv1d_scan_ref"
    sizes = sizes_of(name, zxbcdt, conv1d_weight, D, headdim, ngroups)
    extra = zxbcdt.shape[-1] - sizes.projected
    if extra:
        raise InputError(f"{name}: zxbcdt has {extra} columns for an MLP, expected none")

    def scan(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, gate: Tensor | None) -> Tensor:
        options = (dt_bias, True, dt_limit)
        return ssd_selective_scan(x, dt.to(x.dtype), A, B, C, D, gate, *options)

    norm = norm_of(rmsnorm_weight, rmsnorm_eps, None, norm_before_gate)
    convolution = convolution_of(conv1d_weight, conv1d_bias, None, activation)
    out = mix_heads(zxbcdt, sizes, convolution, scan, norm)
    return project_out(name, out, outproj_weight, outproj_bias)


class MambaChunkScanCombinedFn:
    """`mamba_chunk_scan_combined` for programs that name the original's autograd function."""

    apply: Callable[..., Tensor | tuple[Tensor, ...]] = staticmethod(mamba_chunk_scan_combined)


class MambaSplitConv1dScanCombinedFn:
    """`mamba_split_conv1d_scan_combined` for programs that name the original's function."""

    apply: Callable[..., Tensor | tuple[Tensor, Tensor]] = staticmethod(
        mamba_split_conv1d_scan_combined
    )
