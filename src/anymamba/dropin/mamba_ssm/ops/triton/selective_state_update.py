"""One step of the selective scan, for Mamba's channels and for Mamba-2's heads."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from anymamba import ops
from anymamba.dropin.common.rows import update_rows
from anymamba.dropin.dispatch import by_device
from anymamba.errors import InputError
from anymamba.ops.checks import check_shape
from anymamba.ops.direct import scan_step

__all__ = ["selective_state_update", "selective_state_update_ref"]


@by_device
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One step of the selective scan: changes the state in place, has no gradient.

    Args:
        state: (batch, dim, dstate), or with heads (batch, nheads, dim, dstate).
        x: the input, (batch, dim) or (batch, nheads, dim).
        dt: the step size before bias and softplus, like x.
        A: (dim, dstate) or (nheads, dim, dstate).
        B, C: (batch, dstate), or (batch, ngroups, dstate) for groups of neighbouring heads.
        D, dt_bias: (dim,) or (nheads, dim).
        z: a gate like x; the output is multiplied by silu(z).
        dt_softplus: whether dt goes through softplus after the bias.
        state_batch_indices: (batch,) integers: which row of state, which may then have more
            rows, belongs to each row of x. Where it is negative, the output is zero.

    Returns:
        The output like x.

    Raises:
        InputError: a shape does not fit the others.

    Example:
        >>> state, one = torch.zeros(1, 2, 3), torch.ones(1, 2)
        >>> B, C = torch.ones(1, 3), torch.ones(1, 3)
        >>> selective_state_update(state, one, one, -torch.ones(2, 3), B, C).tolist()
        [[3.0, 3.0]]
    """
    if state_batch_indices is None:
        out = scan_step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
        if out is not None:
            return out
    step = _step_of_heads if _one_decay_a_head(A, dt, dt_bias) else _step_of_channels

    def update(
        state: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor | None
    ) -> Tensor:
        inputs = _in_heads(_Inputs(state, x, dt, A, B, C, D, z, dt_bias))
        return step(inputs, dt_softplus).view(x.shape)

    inputs = (x, dt, B, C, z)
    with torch.no_grad():
        if state_batch_indices is None:
            return update(state, *inputs)
        return update_rows("selective_state_update", state, state_batch_indices, inputs, update)


@torch.no_grad()
def selective_state_update_ref(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """`selective_state_update` in plain PyTorch, without state_batch_indices as in the original."""
    inputs = _in_heads(_Inputs(state, x, dt, A, B, C, D, z, dt_bias))
    return _step_of_channels(inputs, dt_softplus, backend="reference").view(x.shape)


class _Inputs(NamedTuple):
    """A step's tensors, with their shapes where there are heads. The letters: b batch, h heads,
    p channels of a head ("dim"), n states, g groups of heads."""

    state: Tensor  # (b, h, p, n)
    x: Tensor  # (b, h, p)
    dt: Tensor  # (b, h, p)
    A: Tensor  # (h, p, n)
    B: Tensor  # (b, g, n)
    C: Tensor  # (b, g, n)
    D: Tensor | None  # (h, p)
    z: Tensor | None  # (b, h, p)
    dt_bias: Tensor | None  # (h, p)


def _in_heads(inputs: _Inputs) -> _Inputs:
    """The same tensors; without heads, all channels are those of one head."""
    state, x, dt, A, B, C, D, z, dt_bias = inputs

    def with_heads(tensor: Tensor | None, ndim: int, axis: int) -> Tensor | None:
        return tensor.unsqueeze(axis) if tensor is not None and tensor.ndim == ndim else tensor

    if state.ndim not in (3, 4) or x.ndim != state.ndim - 1:
        raise InputError(
            "selective_state_update: expected state of shape (batch, dim, dstate) with x of shape "
            "(batch, dim), or (batch, nheads, dim, dstate) with (batch, nheads, dim), got "
            f"{tuple(state.shape)} with {tuple(x.shape)}"
        )
    # `D` and its like are in the order of the fields, each with the rank it has without heads.
    tensors = ((state, 3, 1), (x, 2, 1), (dt, 2, 1), (A, 2, 0), (B, 2, 1), (C, 2, 1))
    vectors = ((D, 1, 0), (z, 2, 1), (dt_bias, 1, 0))
    inputs = _Inputs._make(with_heads(*entry) for entry in (*tensors, *vectors))
    (b, h, p), n = inputs.x.shape, inputs.state.shape[3]
    shapes = {
        "state": (b, h, p, n),
        "dt": (b, h, p),
        "A": (h, p, n),
        "B": (b, inputs.B.shape[1], n),
        "C": (b, inputs.B.shape[1], n),
        "D": (h, p),
        "z": (b, h, p),
        "dt_bias": (h, p),
    }
    for name, shape in shapes.items():
        check_shape("selective_state_update", name, getattr(inputs, name), shape)
    if h % inputs.B.shape[1]:
        raise InputError(
            f"selective_state_update: B has {inputs.B.shape[1]} groups, which do not divide the "
            f"{h} heads"
        )
    return inputs


def _one_decay_a_head(A: Tensor, dt: Tensor, dt_bias: Tensor | None) -> bool:
    """Whether A and the step were expanded over a head's channels and states, as Mamba-2 does."""
    expanded = [*A.stride()[-2:], dt.stride(-1), 0 if dt_bias is None else dt_bias.stride(-1)]
    return not any(expanded)


def _step_of_channels(inputs: _Inputs, dt_softplus: bool, backend: str | None = None) -> Tensor:
    """Any step: heads laid side by side are channels whose B and C come in groups."""
    state, x, dt, A, B, C, D, z, dt_bias = inputs
    states = state.flatten(1, 2)
    out = ops.selective_state_update(
        states,
        x.flatten(1),
        dt.flatten(1),
        A.flatten(0, 1),
        B,
        C,
        None if D is None else D.flatten(),
        None if z is None else z.flatten(1),
        None if dt_bias is None else dt_bias.flatten(),
        dt_softplus,
        backend=backend,
    )
    _, h, p, _ = state.shape
    if h > 1 and p > 1 and state.stride(1) != p * state.stride(2):  # flattened into a copy
        state.copy_(states.view(state.shape))
    return out


def _step_of_heads(inputs: _Inputs, dt_softplus: bool) -> Tensor:
    """A step with one decay a head: one exponential in place of one for each state."""
    state, x, dt, A, B, C, D, z, dt_bias = inputs
    bias = None if dt_bias is None else dt_bias[:, 0]
    return ops.ssd_state_update(
        *(state, x, dt[..., 0], A[:, 0, 0], B, C, D, z, bias, dt_softplus),
        dt_limit=(-math.inf, math.inf),
    )
