"""The compiled extension of `causal_conv1d`, which programs import under its own name.

Its functions take positional arguments, more with each version of the package; how many there are
tells the version. From 1.6 on they write into tensors that are given and return nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from anymamba.dropin.causal_conv1d.cpp_functions import (
    causal_conv1d_bwd_function,
    causal_conv1d_fwd_function,
    causal_conv1d_update_function,
)
from anymamba.dropin.dispatch import by_device
from anymamba.errors import ArgumentError

__all__ = ["causal_conv1d_bwd", "causal_conv1d_fwd", "causal_conv1d_update"]

_fwd: Callable[..., Tensor] = causal_conv1d_fwd_function
_bwd: Callable[..., tuple[Tensor | None, ...]] = causal_conv1d_bwd_function
_update: Callable[..., Tensor] = causal_conv1d_update_function


@by_device
def causal_conv1d_fwd(*arguments: Any) -> Tensor | None:
    """The forward pass of `causal_conv1d_fn`.

    Args:
        arguments: x, weight, bias, silu_activation in version 1.0; seq_idx before silu_activation
            in 1.1; seq_idx, initial_states, final_states_out before it from 1.2 on; and from 1.6
            on out before final_states_out.

    Returns:
        The output like x, or None if out is given.

    Raises:
        ArgumentError: there is no version with so many arguments.

    Example:
        >>> import torch
        >>> x, weight = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[10.0, 1.0]])
        >>> causal_conv1d_fwd(x, weight, None, False).tolist()
        [[[1.0, 12.0, 23.0]]]
    """
    tensors, silu = arguments[:-1], arguments[-1] if arguments else None
    match len(arguments):
        case 4 | 5:
            # x, weight, bias, and perhaps seq_idx
            return _fwd(*tensors[:3], *_padded(tensors[3:], 3), silu)
        case 7:
            return _fwd(*tensors, silu)
        case 8:
            x, weight, bias, seq_idx, initial_states, out, final_states_out = tensors
            inputs = (x, weight, bias, seq_idx, initial_states, final_states_out)
            out.copy_(_fwd(*inputs, silu))
            return None
    raise _unknown("causal_conv1d_fwd", arguments, "4, 5, 7 or 8")


@by_device
def causal_conv1d_bwd(*arguments: Any) -> tuple[Tensor | None, ...] | None:
    """The backward pass of `causal_conv1d_fn`.

    Args:
        arguments: x, weight, bias, dout, dx, silu_activation in version 1.0; seq_idx before dx in
            1.1; seq_idx, initial_states, dfinal_states, dx, return_dinitial_states,
            silu_activation after dout from 1.2 on; and from 1.6 on dx, dweight, dbias,
            dinitial_states, silu_activation after dfinal_states, where the gradients of weight and
            bias are added to what is there.

    Returns:
        The gradients of x, weight and bias, from 1.2 on of the initial states too, None for what
        is not there; from 1.6 on None in all.

    Raises:
        ArgumentError: there is no version with so many arguments.

    Example:
        >>> import torch
        >>> x, weight = torch.ones(1, 1, 3), torch.tensor([[10.0, 1.0]])
        >>> dx, dweight, dbias = causal_conv1d_bwd(x, weight, None, x, None, False)
        >>> dx.tolist(), dweight.tolist(), dbias
        ([[[11.0, 11.0, 1.0]]], [[2.0, 3.0]], None)
    """
    silu = arguments[-1] if arguments else None
    match len(arguments):
        case 6 | 7:
            seq_idx, dx = _padded(arguments[4:-1][::-1], 2)[::-1]
            inputs = (*arguments[:4], seq_idx, None, None, dx, False)
            return _bwd(*inputs, silu)[:3]
        case 10:
            return _bwd(*arguments)
        case 12:
            dx, dweight, dbias, dinitial_states = arguments[7:11]
            wanted = dinitial_states is not None
            found = _bwd(*arguments[:7], dx, wanted, silu)
            for place, gradient in ((dweight, found[1]), (dbias, found[2])):
                if place is not None and gradient is not None:
                    place.add_(gradient)
            if wanted:
                dinitial_states.copy_(found[3])
            return None
    raise _unknown("causal_conv1d_bwd", arguments, "6, 7, 10 or 12")


@by_device
def causal_conv1d_update(*arguments: Any) -> Tensor | None:
    """`causal_conv1d_update` of the package, with all arguments in the extension's order.

    Args:
        arguments: x, conv_state, weight, bias, silu_activation; in later versions cache_seqlens
            and then conv_state_indices behind it; and from 1.6 on out before it.

    Returns:
        The output like x, or None if out is given.

    Raises:
        ArgumentError: there is no version with so many arguments.

    Example:
        >>> import torch
        >>> state, weight = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[10.0, 1.0]])
        >>> causal_conv1d_update(torch.tensor([[3.0]]), state, weight, None, False).tolist()
        [[23.0]]
    """
    match len(arguments):
        case 5 | 6 | 7:
            inputs = (*arguments[:5], *_padded(arguments[5:], 2))
            return _update(*inputs)
        case 8:
            out = arguments[4]
            out.copy_(_update(*arguments[:4], *arguments[5:]))
            return None
    raise _unknown("causal_conv1d_update", arguments, "5, 6, 7 or 8")


def _padded(values: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """The values, and None for those that an older version does not have."""
    return values + (None,) * (count - len(values))


def _unknown(function: str, arguments: tuple[Any, ...], known: str) -> ArgumentError:
    return ArgumentError(
        f"causal_conv1d_cuda.{function}: AnyMamba, which stands for this extension here, knows the "
        f"versions with {known} arguments, got {len(arguments)}; use a published version of "
        "causal_conv1d, or causal_conv1d_fn of the package"
    )
