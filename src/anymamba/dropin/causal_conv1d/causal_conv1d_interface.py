"""The causal depthwise convolution, over a sequence and for the next few steps of one.

Sequences are (batch, dim, seqlen), with time or channels next to each other in memory; windows are
(batch, dim, number of inputs), oldest first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anymamba import ops
from anymamba.dropin.common.rows import update_rows
from anymamba.dropin.dispatch import by_device
from anymamba.errors import InputError
from anymamba.ops.checks import check_shape
from anymamba.ops.direct import conv_step

__all__ = [
    "CausalConv1dFn",
    "causal_conv1d_fn",
    "causal_conv1d_ref",
    "causal_conv1d_update",
    "causal_conv1d_update_ref",
]

Output = Tensor | tuple[Tensor, Tensor]


@by_device
def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Output:
    """Convolve each channel with its own kernel over the past. Differentiable.

    Args:
        x: (batch, dim, seqlen).
        weight: one kernel a channel, (dim, width); the last column meets the present.
        bias: (dim,).
        seq_idx: (batch, seqlen) integers: the window restarts from zeros where they change, and
            where they are negative, the output is zero.
        initial_states: the inputs before the first, (batch, dim, width - 1); zeros when None.
        return_final_states: whether to return the last width - 1 inputs as well. With seq_idx,
            which the original refuses here, they are those of each row's last sequence.
        final_states_out: a tensor that takes these inputs.
        activation: None, "silu" or "swish", which is the same.

    Returns:
        The output like x, and with return_final_states the final states, (batch, dim, width - 1).

    Raises:
        InputError: a shape does not fit the others, or the activation is unknown.

    Example:
        >>> from anymamba.dropin.causal_conv1d import causal_conv1d_fn
        >>> x = torch.tensor([[[1.0, 2.0, 3.0]]])
        >>> causal_conv1d_fn(x, torch.tensor([[10.0, 1.0]])).tolist()
        [[[1.0, 12.0, 23.0]]]
    """
    inputs = (x, weight, bias, seq_idx, initial_states, activation)
    return _answer(*_convolve(*inputs, backend=None), return_final_states, final_states_out)


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    seq_idx: Tensor | None = None,
) -> Output:
    """`causal_conv1d_fn` in plain PyTorch. Note the other order of its arguments."""
    inputs = (x, weight, bias, seq_idx, initial_states, activation)
    return _answer(*_convolve(*inputs, backend="reference"), return_final_states, final_states_out)


class CausalConv1dFn:
    """`causal_conv1d_fn` for programs that call the original's autograd function by its name."""

    apply = staticmethod(causal_conv1d_fn)


@by_device
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Go on with a convolution: changes the window in place, has no gradient.

    Args:
        x: the next input, (batch, dim), or several of them, (batch, dim, seqlen).
        conv_state: the last inputs, (batch, dim, state_len) with state_len >= width - 1; x is
            appended to them.
        weight, bias, activation: as in `causal_conv1d_fn`.
        cache_seqlens: (batch,) integers: how many inputs each row has seen. conv_state is then a
            ring, and x goes to the places from cache_seqlens modulo state_len.
        conv_state_indices: (batch,) integers: which row of conv_state, then (any, dim, state_len),
            belongs to each row of x. Where it is negative, the output is zero.

    Returns:
        The output like x.

    Raises:
        InputError: a shape does not fit the others, or the activation is unknown.

    Example:
        >>> from anymamba.dropin.causal_conv1d import causal_conv1d_update
        >>> state = torch.tensor([[[1.0, 2.0]]])
        >>> y = causal_conv1d_update(torch.tensor([[3.0]]), state, torch.tensor([[10.0, 1.0]]))
        >>> y.tolist(), state.tolist()
        ([[23.0]], [[[2.0, 3.0]]])
    """
    if cache_seqlens is None and conv_state_indices is None:
        one = x.squeeze(2) if x.ndim == 3 and x.shape[2] == 1 else x
        out = conv_step(one, conv_state, weight, bias, activation)
        if out is not None:
            return out if one is x else out.unsqueeze(2)

    def update(conv_state: Tensor, x: Tensor, cache_seqlens: Tensor | None) -> Tensor:
        return _update(x, conv_state, weight, bias, activation, cache_seqlens, backend=None)

    with torch.no_grad():
        if conv_state_indices is None:
            return update(conv_state, x, cache_seqlens)
        inputs = (x, cache_seqlens)
        return update_rows("causal_conv1d_update", conv_state, conv_state_indices, inputs, update)


@torch.no_grad()
def causal_conv1d_update_ref(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
) -> Tensor:
    """`causal_conv1d_update` in plain PyTorch, without conv_state_indices as in the original."""
    return _update(x, conv_state, weight, bias, activation, cache_seqlens, backend="reference")


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    activation: str | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """The output and the final states."""
    batch, dim, _, width = _sizes("causal_conv1d_fn", x, weight)
    check_shape("causal_conv1d_fn", "initial_states", initial_states, (batch, dim, width - 1))
    out, window = ops.causal_conv1d(
        x.mT,
        weight,
        bias,
        activation,
        initial_window=initial_states,
        return_final_window=True,
        seq_idx=seq_idx,
        backend=backend,
    )
    out = out.mT
    if seq_idx is not None:
        out = out.masked_fill((seq_idx < 0)[:, None], 0)
    # A window that started from nothing has one column more.
    return out, window[:, :, window.shape[2] - (width - 1) :]


def _answer(
    out: Tensor, final_states: Tensor, wants_final_states: bool, place: Tensor | None
) -> Output:
    if not wants_final_states:
        return out
    return out, final_states if place is None else place.copy_(final_states)


def _update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cache_seqlens: Tensor | None,
    backend: str | None,
) -> Tensor:
    if x.ndim == 2:
        steps = (x[..., None], conv_state, weight, bias, activation, cache_seqlens)
        return _update(*steps, backend)[..., 0]
    batch, dim, seqlen, width = _sizes("causal_conv1d_update", x, weight)
    state_len = conv_state.shape[-1]
    check_shape("causal_conv1d_update", "conv_state", conv_state, (batch, dim, state_len))
    if state_len < width - 1:
        raise InputError(
            f"causal_conv1d_update: conv_state keeps {state_len} inputs, but a kernel of width "
            f"{width} needs {width - 1} or more"
        )
    check_shape("causal_conv1d_update", "cache_seqlens", cache_seqlens, (batch,))
    kernels = (weight, bias, activation)
    if cache_seqlens is None and seqlen == 1 and state_len == width:
        step = (x[..., 0], conv_state, *kernels)
        return ops.causal_conv1d_update(*step, backend=backend)[..., None]
    past = _newest(conv_state, cache_seqlens, width - 1)
    out = ops.causal_conv1d(x.mT, *kernels, initial_window=past, backend=backend)
    assert isinstance(out, Tensor)
    _append(conv_state, cache_seqlens, x)
    return out.mT


def _newest(conv_state: Tensor, cache_seqlens: Tensor | None, count: int) -> Tensor:
    """The last `count` inputs, oldest first."""
    if cache_seqlens is None:
        return conv_state[..., conv_state.shape[2] - count :]
    return conv_state.gather(2, _on_the_ring(conv_state, cache_seqlens, -count, 0))


def _append(conv_state: Tensor, cache_seqlens: Tensor | None, x: Tensor) -> None:
    """Let the newest inputs take the place of the oldest."""
    state_len, seqlen = conv_state.shape[2], x.shape[2]
    x = x.to(conv_state.dtype)
    if cache_seqlens is None:
        conv_state.copy_(torch.cat([conv_state, x], 2)[..., seqlen:])
    else:
        # Those that would be overwritten at once are left out, since a scatter has no order.
        first = max(0, seqlen - state_len)
        places = _on_the_ring(conv_state, cache_seqlens, first, seqlen)
        conv_state.scatter_(2, places, x[..., first:])


def _on_the_ring(conv_state: Tensor, cache_seqlens: Tensor, first: int, stop: int) -> Tensor:
    """The places of the inputs first to stop - 1, counted from the next one: (b, dim, count)."""
    counts = torch.arange(first, stop, device=conv_state.device) + cache_seqlens[:, None]
    places = torch.remainder(counts, conv_state.shape[2])
    return places[:, None].expand(-1, conv_state.shape[1], -1)


def _sizes(function: str, x: Tensor, weight: Tensor) -> tuple[int, int, int, int]:
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[0] != x.shape[1]:
        raise InputError(
            f"{function}: expected x of shape (batch, dim, seqlen) and weight of shape "
            f"(dim, width), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    return (*x.shape, weight.shape[1])
