"""The windows that packed sequences leave for the next step."""

from __future__ import annotations

import torch
from torch import Tensor

from anymamba.dropin.dispatch import by_device
from anymamba.errors import InputError

__all__ = ["causal_conv1d_varlen_states", "causal_conv1d_varlen_states_ref"]


@by_device
@torch.no_grad()
def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last inputs of each packed sequence, as `causal_conv1d_update` wants them.

    Args:
        x: all sequences one after the other, (total, dim).
        cu_seqlens: (batch + 1,) rising offsets of the sequences, from 0.
        state_len: how many inputs to keep of each.

    Returns:
        (batch, dim, state_len), oldest first, zeros where a sequence is shorter. No gradient.

    Raises:
        InputError: a shape does not fit.

    Example:
        >>> x = torch.arange(1.0, 6.0)[:, None]
        >>> causal_conv1d_varlen_states(x, torch.tensor([0, 4, 5]), 3).tolist()
        [[[2.0, 3.0, 4.0]], [[0.0, 0.0, 5.0]]]
    """
    _check(x, cu_seqlens)
    starts, stops = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    places = stops + torch.arange(-state_len, 0, device=x.device)
    own = places >= starts
    # A place before the sequence reads any row, of which nothing is kept.
    states = (
        x[places.where(own, 0)].where(own[..., None], 0)
        if len(x)
        else x.new_zeros(*places.shape, x.shape[1])
    )
    return states.transpose(1, 2)


@torch.no_grad()
def causal_conv1d_varlen_states_ref(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The definition of `causal_conv1d_varlen_states`: the same, one sequence after the other."""
    _check(x, cu_seqlens)
    offsets = cu_seqlens.tolist()
    states = x.new_zeros(len(offsets) - 1, x.shape[1], state_len)
    for row, stop in enumerate(offsets[1:]):
        kept = min(stop - offsets[row], state_len)
        states[row, :, state_len - kept :] = x[stop - kept : stop].mT
    return states


def _check(x: Tensor, cu_seqlens: Tensor) -> None:
    if x.ndim != 2 or cu_seqlens.ndim != 1 or cu_seqlens.is_floating_point():
        raise InputError(
            "causal_conv1d_varlen_states: expected x of shape (total, dim) and cu_seqlens of "
            f"batch + 1 integers, got {tuple(x.shape)}, and {tuple(cu_seqlens.shape)} of "
            f"{cu_seqlens.dtype}"
        )
