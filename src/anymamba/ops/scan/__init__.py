"""The selective scan, over a whole sequence and for one step.

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t        y_t = C_t h_t + D x_t

Source: "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752),
equation 2 with the discretization of section 3.2: zero-order hold for A, Euler for B.
"""

from __future__ import annotations

from typing import cast

from jaxtyping import Float, Inexact, Int
from torch import Tensor

from anymamba.errors import InputError
from anymamba.ops.backends import implementation
from anymamba.ops.checks import check_axes, check_shape
from anymamba.ops.scan.arguments import ScanArguments, StepArguments
from anymamba.ops.segments import count_states, segments_of
from anymamba.ops.tracing import copy_for_backward

__all__ = ["selective_scan", "selective_state_update"]


def selective_scan(
    x_ble: Float[Tensor, "b l e"],
    delta_ble: Float[Tensor, "b l e"],
    A_en: Inexact[Tensor, "e n"],
    B_bln: Inexact[Tensor, "b l n"] | Inexact[Tensor, "b l g n"],
    C_bln: Inexact[Tensor, "b l n"] | Inexact[Tensor, "b l g n"],
    D_e: Float[Tensor, " e"] | None = None,
    z_ble: Float[Tensor, "b l e"] | None = None,
    delta_bias_e: Float[Tensor, " e"] | None = None,
    delta_softplus: bool = False,
    *,
    initial_state: Inexact[Tensor, "s e n"] | None = None,
    return_last_state: bool = False,
    seq_idx: Int[Tensor, "b l"] | None = None,
    cu_seqlens: Int[Tensor, " s1"] | None = None,
    reverse: bool = False,
    backend: str | None = None,
    fallback: str = "reference",
) -> Float[Tensor, "b l e"] | tuple[Float[Tensor, "b l e"], Inexact[Tensor, "s e n"]]:
    """Run the selective state space over sequences. Differentiable in every tensor.

    Args:
        x_ble: the input, (b, l, e).
        delta_ble: the step size before bias and softplus, (b, l, e).
        A_en: the (negative) rates of decay, (e, n). They may be complex, with negative real parts;
            y is then twice the real part of C_t h_t, as if each state had its conjugate beside
            it, and only the reference can run it.
        B_bln, C_bln: input and output maps, (b, l, n), or (b, l, g, n) when each of g groups of
            e / g neighbouring channels has its own. Complex only where A is.
        D_e: the skip connection, (e,).
        z_ble: a gate; the output is multiplied by silu(z).
        delta_bias_e: added to delta, (e,).
        delta_softplus: whether delta goes through softplus after the bias.
        initial_state: the state before the first step, (b, e, n); zeros when None.
        return_last_state: whether to return the state after the last step as well.
        seq_idx: (b, l) integers; the state restarts from zero where they change. initial_state
            and last state then belong to the rows.
        cu_seqlens: (s + 1,) offsets of s sequences packed in one row (b is 1). initial_state and
            last state then belong to the sequences: (s, e, n).
        reverse: walk from the last position to the first; the initial state stands after the
            last position, and the last state before the first.
        backend: a choice for this call alone, see `anymamba.ops.backend`.
        fallback: what the automatic choice takes where no kernel serves the call, "reference"
            or "mambapy".

    Returns:
        y_ble in the type of x, and with return_last_state the last state, (b, e, n) or
        (s, e, n), float32 (float64 for float64 inputs) or complex of that precision.

    Raises:
        InputError: a shape does not fit the others, or B or C is complex and A is real.
        BackendError: the chosen backend cannot run the call.

    Example:
        >>> import torch
        >>> from anymamba.ops import selective_scan
        >>> x, delta = torch.randn(2, 5, 6), torch.rand(2, 5, 6)
        >>> A, B, C = -torch.rand(6, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 4)
        >>> whole, last = selective_scan(x, delta, A, B, C, return_last_state=True)
        >>> _, state = selective_scan(
        ...     x[:, :3], delta[:, :3], A, B[:, :3], C[:, :3], return_last_state=True
        ... )
        >>> rest = selective_scan(
        ...     x[:, 3:], delta[:, 3:], A, B[:, 3:], C[:, 3:], initial_state=state
        ... )
        >>> torch.allclose(whole[:, 3:], rest, atol=1e-5)
        True
    """
    check_axes("selective_scan", ("an input", x_ble, "b, l, e"), ("A", A_en, "e, n"))
    segments = segments_of(x_ble.shape[:2], seq_idx, cu_seqlens, reverse)
    initial_state = copy_for_backward(initial_state)
    inputs = (x_ble, delta_ble, A_en, B_bln, C_bln, D_e, z_ble, delta_bias_e, delta_softplus)
    arguments = ScanArguments(*inputs, initial_state, return_last_state, segments, reverse)
    n_states = count_states(segments, x_ble.shape[0])
    _check_shapes("selective_scan", arguments, n_states)
    run = implementation("selective_scan", arguments, backend, fallback)
    y_ble, last_state = run(arguments)
    return (y_ble, last_state) if return_last_state else y_ble


def selective_state_update(
    state_ben: Float[Tensor, "b e n"],
    x_be: Float[Tensor, "b e"],
    delta_be: Float[Tensor, "b e"],
    A_en: Float[Tensor, "e n"],
    B_bn: Float[Tensor, "b n"] | Float[Tensor, "b g n"],
    C_bn: Float[Tensor, "b n"] | Float[Tensor, "b g n"],
    D_e: Float[Tensor, " e"] | None = None,
    z_be: Float[Tensor, "b e"] | None = None,
    delta_bias_e: Float[Tensor, " e"] | None = None,
    delta_softplus: bool = False,
    *,
    backend: str | None = None,
) -> Float[Tensor, "b e"]:
    """One step of the selective scan: changes the state in place, has no gradient.

    Args:
        state_ben: the state, (b, e, n); overwritten with the state after the step.
        x_be, delta_be, z_be: one position of what `selective_scan` takes, (b, e).
        A_en, D_e, delta_bias_e, delta_softplus: as in `selective_scan`.
        B_bn, C_bn: (b, n), or (b, g, n) in groups.
        backend: a choice for this call alone.

    Returns:
        y_be in the type of x.

    Raises:
        InputError: a shape does not fit the others.

    Example:
        >>> import torch
        >>> from anymamba.ops import selective_state_update
        >>> state = torch.zeros(1, 6, 4)
        >>> y = selective_state_update(
        ...     state, torch.ones(1, 6), torch.ones(1, 6), -torch.ones(6, 4), torch.ones(1, 4),
        ...     torch.ones(1, 4),
        ... )
        >>> y.shape, state[0, 0].tolist()
        (torch.Size([1, 6]), [1.0, 1.0, 1.0, 1.0])
    """
    check_axes("selective_state_update", ("an input", x_be, "b, e"), ("A", A_en, "e, n"))
    arguments = StepArguments(
        x_be, delta_be, A_en, B_bn, C_bn, D_e, z_be, delta_bias_e, delta_softplus, state_ben
    )
    _check_shapes("selective_state_update", arguments, x_be.shape[0])
    return cast(Tensor, implementation("selective_state_update", arguments, backend)(arguments))


def _check_shapes(operator: str, arguments: ScanArguments | StepArguments, n_states: int) -> None:
    x, delta, A_en, B, C, D_e, z, delta_bias_e, _, state = arguments[:10]
    rows, e, n = x.shape[:-1], x.shape[-1], A_en.shape[1]
    check_shape(operator, "delta", delta, (*rows, e))
    check_shape(operator, "A", A_en, (e, n))
    for name, tensor in (("B", B), ("C", C)):
        groups = tensor.shape[-2] if tensor.ndim == len(rows) + 2 else 1
        check_shape(operator, name, tensor, (*rows, n), (*rows, groups, n))
        if tensor.is_complex() and not A_en.is_complex():
            raise InputError(
                f"{operator}: {name} is complex and A is real; make A complex, or pass {name}.real"
            )
        if groups < 1 or e % groups:
            raise InputError(f"{operator}: {name} has {groups} groups, which do not divide e={e}")
    for name, vector in (("D", D_e), ("delta_bias", delta_bias_e)):
        check_shape(operator, name, vector, (e,))
    check_shape(operator, "z", z, (*rows, e))
    check_shape(operator, arguments._fields[9], state, (n_states, e, n))
