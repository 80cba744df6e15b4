"""Updates of some rows of a batch of states, for servers that keep more states than they use."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from anymamba.errors import InputError


def update_rows(
    function: str,
    state: Tensor,
    rows: Tensor,
    inputs: Sequence[Tensor | None],
    update: Callable[..., Tensor],
) -> Tensor:
    """Update those states that the batch's rows name; a negative number marks a row as padding.

    Args:
        function: the name of the function that errors speak of.
        state: (s, ...), of which the named rows are overwritten.
        rows: (b,) integers: which state belongs to each row of the batch.
        inputs: tensors whose first axis is the batch, or None. The first is like the output.
        update: called with the chosen states and inputs; changes the states in place.

    Returns:
        What `update` returned, zeros in the rows that are padding.

    Raises:
        InputError: `rows` does not hold one number a row, or names a state that is not there.

    Example:
        >>> counts = torch.zeros(4)
        >>> ones = torch.ones(2)
        >>> update_rows("count", counts, torch.tensor([3, -1]), [ones], lambda s, x: s.add_(x))
        tensor([1., 0.])
        >>> counts
        tensor([0., 0., 0., 1.])
    """
    first = inputs[0]
    assert first is not None
    if rows.shape != first.shape[:1] or rows.is_floating_point():
        raise InputError(
            f"{function}: the indices of states must be {first.shape[0]} integers, one a row of "
            f"the batch, got shape {tuple(rows.shape)} of {rows.dtype}"
        )
    used = torch.nonzero(rows >= 0)[:, 0]
    chosen = rows[used].long()
    if chosen.numel() and int(chosen.max()) >= state.shape[0]:
        raise InputError(
            f"{function}: the indices name state {int(chosen.max())}, but there are "
            f"{state.shape[0]}, counted from 0"
        )
    states = state[chosen]
    result = update(states, *(None if tensor is None else tensor[used] for tensor in inputs))
    state.index_copy_(0, chosen, states)
    out = result.new_zeros(first.shape[0], *result.shape[1:])
    return out.index_copy_(0, used, result)
