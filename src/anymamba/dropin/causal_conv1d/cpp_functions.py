"""The convolution's passes, as `causal_conv1d` calls its compiled extension.

They know nothing of autograd: programs wrap them in an autograd function of their own.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from anymamba.dropin.causal_conv1d.causal_conv1d_interface import (
    causal_conv1d_fn,
    causal_conv1d_update,
)
from anymamba.dropin.common.gradients import filled, gradients
from anymamba.dropin.dispatch import by_device

__all__ = [
    "causal_conv1d_bwd_function",
    "causal_conv1d_fwd_function",
    "causal_conv1d_update_function",
]


@by_device
@torch.no_grad()
def causal_conv1d_fwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    final_states_out: Tensor | None,
    silu_activation: bool,
) -> Tensor:
    """The forward pass of `causal_conv1d_fn`, whose arguments these are; silu is its activation.

    Returns:
        The output like x.

    Example:
        >>> x = torch.tensor([[[1.0, 2.0, 3.0]]])
        >>> weight = torch.tensor([[10.0, 1.0]])
        >>> causal_conv1d_fwd_function(x, weight, None, None, None, None, False).tolist()
        [[[1.0, 12.0, 23.0]]]
    """
    out, _ = causal_conv1d_fn(
        x,
        weight,
        bias,
        seq_idx,
        initial_states,
        return_final_states=True,
        final_states_out=final_states_out,
        activation=_activation(silu_activation),
    )
    return cast(Tensor, out)


@by_device
def causal_conv1d_bwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dout: Tensor,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    dfinal_states: Tensor | None,
    dx: Tensor | None,
    return_dinitial_states: bool,
    silu_activation: bool,
) -> tuple[Tensor | None, ...]:
    """The backward pass of `causal_conv1d_fn`.

    Args:
        x, weight, bias, seq_idx, initial_states: as in `causal_conv1d_fn`.
        dout: the gradient of the output, like x.
        dfinal_states: the gradient of the final states, (batch, dim, width - 1).
        dx: takes the gradient of x, if it is given.
        return_dinitial_states: whether the gradient of the initial states is wanted.
        silu_activation: whether the output went through silu.

    Returns:
        The gradients of x, weight, bias and initial states, None for what is not there.

    Example:
        >>> x, weight = torch.ones(1, 1, 3), torch.tensor([[10.0, 1.0]])
        >>> dx, dweight, *_ = causal_conv1d_bwd_function(
        ...     x, weight, None, torch.ones_like(x), None, None, None, None, False, False
        ... )
        >>> dx.tolist(), dweight.tolist()
        ([[[11.0, 11.0, 1.0]]], [[2.0, 3.0]])
    """

    def convolution(*tensors: Any) -> tuple[Tensor, ...]:
        x, weight, bias, initial = tensors
        returned = causal_conv1d_fn(
            x, weight, bias, seq_idx, initial, True, activation=_activation(silu_activation)
        )
        return cast("tuple[Tensor, ...]", returned)

    if return_dinitial_states and initial_states is None:
        initial_states = x.new_zeros(x.shape[0], x.shape[1], weight.shape[1] - 1)
    inputs = (x, weight, bias, initial_states)
    _, (of_x, of_weight, of_bias, of_initial) = gradients(
        convolution, inputs, [dout, dfinal_states]
    )
    return filled(dx, of_x), of_weight, of_bias, of_initial if return_dinitial_states else None


@by_device
def causal_conv1d_update_function(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu_activation: bool,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
) -> Tensor:
    """`causal_conv1d_update` with all arguments in the extension's order; silu is the activation.

    Example:
        >>> state, weight = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[10.0, 1.0]])
        >>> x = torch.tensor([[3.0]])
        >>> causal_conv1d_update_function(x, state, weight, None, False, None, None).tolist()
        [[23.0]]
    """
    activation = _activation(silu_activation)
    out: Tensor = causal_conv1d_update(
        x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices
    )
    return out


def _activation(silu: bool) -> str | None:
    return "silu" if silu else None
