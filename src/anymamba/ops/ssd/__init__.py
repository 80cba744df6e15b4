"""The state space duality of Mamba-2: a selective scan whose decay is one number a head.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = C_t h_t + D x_t

A name ends in its tensor's shape: b batch, l length, h heads, p width of a head, n state size,
g groups of heads that share B and C. Source: "Transformers are SSMs: Generalized Models and
Efficient Algorithms Through Structured State Space Duality" (arXiv 2405.21060).
"""

from __future__ import annotations

import warnings
from typing import cast

from jaxtyping import Float, Int
from torch import Tensor

from anymamba.errors import InputError
from anymamba.ops.backends import implementation
from anymamba.ops.checks import check_axes, check_shape
from anymamba.ops.segments import count_states, segments_of
from anymamba.ops.ssd.arguments import NO_LIMIT, SsdArguments, SsdStepArguments
from anymamba.ops.tracing import copy_for_backward

__all__ = ["ssd", "ssd_state_update"]


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
    dt_limit: tuple[float, float] = NO_LIMIT,
    initial_state: Float[Tensor, "s h p n"] | None = None,
    return_last_state: bool = False,
    seq_idx: Int[Tensor, "b l"] | None = None,
    cu_seqlens: Int[Tensor, " s1"] | None = None,
    chunk_size: int | None = None,
    backend: str | None = None,
    initial_states: Float[Tensor, "s h p n"] | None = None,
    return_final_states: bool = False,
) -> Float[Tensor, "b l h p"] | tuple[Float[Tensor, "b l h p"], Float[Tensor, "s h p n"]]:
    """Run Mamba-2's state space over sequences. Differentiable in every tensor.

    Its time goes into matrix products: the native core's, those of Triton kernels on a GPU, or
    PyTorch's on any device.

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
        initial_state: the state before the first step, (b, h, p, n); zeros when None.
        return_last_state: whether to return the state after the last step as well.
        seq_idx: (b, l) integers; the state restarts from zero where they change. initial_state
            and last state then belong to the rows.
        cu_seqlens: (s + 1,) offsets of s sequences packed in one row (b is 1). initial_state and
            last state then belong to the sequences: (s, h, p, n).
        chunk_size: how many steps one matrix product of PyTorch's takes together. Results do not
            depend on it; None is what was measured as fastest. The native core and Triton's
            kernels choose it themselves.
        backend: a choice for this call alone, see `anymamba.ops.backend`.
        initial_states, return_final_states: older names of initial_state and return_last_state.

    Returns:
        y_blhp in the type of x, and with return_last_state the last state, float32 (float64 for
        float64 inputs).

    Raises:
        InputError: a shape does not fit the others, or a limit or chunk size makes no sense.

    Example:
        >>> import torch
        >>> from anymamba.ops import ssd
        >>> x, dt = torch.randn(1, 5, 4, 8), torch.rand(1, 5, 4)
        >>> A, B, C = -torch.rand(4), torch.randn(1, 5, 2, 3), torch.randn(1, 5, 2, 3)
        >>> whole, last = ssd(x, dt, A, B, C, return_last_state=True)
        >>> _, state = ssd(x[:, :2], dt[:, :2], A, B[:, :2], C[:, :2], return_last_state=True)
        >>> rest = ssd(x[:, 2:], dt[:, 2:], A, B[:, 2:], C[:, 2:], initial_state=state)
        >>> torch.allclose(whole[:, 2:], rest, atol=1e-5), last.shape
        (True, torch.Size([1, 4, 8, 3]))
    """
    if initial_states is not None or return_final_states:
        message = "ssd: initial_states and return_final_states are called initial_state and "
        warnings.warn(message + "return_last_state now", DeprecationWarning, stacklevel=2)
        initial_state = initial_states if initial_state is None else initial_state
        return_last_state = return_last_state or return_final_states
    check_axes("ssd", ("an input", x_blhp, "b, l, h, p"), ("B", B_blgn, "b, l, g, n"))
    segments = segments_of(x_blhp.shape[:2], seq_idx, cu_seqlens, reverse=False)
    if chunk_size is not None and chunk_size < 1:
        raise InputError(f"ssd: chunk_size is {chunk_size}, expected a whole number from 1 up")
    initial_state = copy_for_backward(initial_state)
    inputs = (x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h, z_blhp, dt_bias_h, dt_softplus, dt_limit)
    arguments = SsdArguments(*inputs, initial_state, return_last_state, segments, chunk_size)
    _check_shapes("ssd", arguments, count_states(segments, x_blhp.shape[0]))
    y_blhp, last_state = implementation("ssd", arguments, backend)(arguments)
    return (y_blhp, last_state) if return_last_state else y_blhp


def ssd_state_update(
    state_bhpn: Float[Tensor, "b h p n"],
    x_bhp: Float[Tensor, "b h p"],
    dt_bh: Float[Tensor, "b h"],
    A_h: Float[Tensor, " h"],
    B_bgn: Float[Tensor, "b g n"],
    C_bgn: Float[Tensor, "b g n"],
    D_h: Float[Tensor, " h"] | Float[Tensor, "h p"] | None = None,
    z_bhp: Float[Tensor, "b h p"] | None = None,
    dt_bias_h: Float[Tensor, " h"] | None = None,
    dt_softplus: bool = False,
    *,
    dt_limit: tuple[float, float] = NO_LIMIT,
    backend: str | None = None,
) -> Float[Tensor, "b h p"]:
    """One step of `ssd`: changes the state in place, has no gradient.

    Args:
        state_bhpn: the state, (b, h, p, n); overwritten with the state after the step.
        x_bhp, dt_bh, B_bgn, C_bgn, z_bhp: one position of what `ssd` takes.
        A_h, D_h, dt_bias_h, dt_softplus, dt_limit: as in `ssd`.
        backend: a choice for this call alone, see `anymamba.ops.backend`.

    Returns:
        y_bhp in the type of x.

    Raises:
        InputError: a shape does not fit the others, or the limits make no sense.
        BackendError: the chosen backend cannot run here.

    Example:
        >>> import torch
        >>> from anymamba.ops import ssd_state_update
        >>> state, x, maps = torch.zeros(1, 2, 3, 4), torch.ones(1, 2, 3), torch.ones(1, 1, 4)
        >>> y = ssd_state_update(state, x, torch.ones(1, 2), -torch.ones(2), maps, maps)
        >>> y[0, 0].tolist(), state[0, 0, 0].tolist()
        ([4.0, 4.0, 4.0], [1.0, 1.0, 1.0, 1.0])
    """
    check_axes("ssd_state_update", ("an input", x_bhp, "b, h, p"), ("B", B_bgn, "b, g, n"))
    arguments = SsdStepArguments(
        x_bhp, dt_bh, A_h, B_bgn, C_bgn, D_h, z_bhp, dt_bias_h, dt_softplus, dt_limit, state_bhpn
    )
    _check_shapes("ssd_state_update", arguments, x_bhp.shape[0])
    return cast(Tensor, implementation("ssd_state_update", arguments, backend)(arguments))


def _check_shapes(operator: str, arguments: SsdArguments | SsdStepArguments, n_states: int) -> None:
    x, dt, A_h, B, C, D_h, z, dt_bias_h, _, limit, state = arguments[:11]
    rows, (h, p), (g, n) = x.shape[:-2], x.shape[-2:], B.shape[-2:]
    check_shape(operator, "dt", dt, (*rows, h))
    for name, vector in (("A", A_h), ("dt_bias", dt_bias_h)):
        check_shape(operator, name, vector, (h,))
    for name, tensor in (("B", B), ("C", C)):
        check_shape(operator, name, tensor, (*rows, g, n))
    if g < 1 or h % g:
        raise InputError(f"{operator}: B and C have {g} groups, which do not divide h={h}")
    check_shape(operator, "D", D_h, (h,), (h, p))
    check_shape(operator, "z", z, (*rows, h, p))
    check_shape(operator, arguments._fields[10], state, (n_states, h, p, n))
    if not limit[0] <= limit[1]:
        raise InputError(f"{operator}: dt_limit is {limit}, expected the smaller number first")
