"""The causal depthwise convolution, over a whole sequence and for one step.

Each channel sees its own last k inputs: y_t = bias + sum_j w_j x_{t-k+1+j}. Source: "Mamba:
Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752), figure 3.
"""

from __future__ import annotations

from typing import cast

from jaxtyping import Float, Int
from torch import Tensor

from anymamba.errors import InputError
from anymamba.ops.backends import implementation
from anymamba.ops.checks import check_activation, check_axes, check_shape
from anymamba.ops.conv.arguments import ConvArguments, ConvStepArguments
from anymamba.ops.segments import count_states, segments_of
from anymamba.ops.tracing import copy_for_backward

__all__ = ["causal_conv1d", "causal_conv1d_update"]


def causal_conv1d(
    x_ble: Float[Tensor, "b l e"],
    weight_ek: Float[Tensor, "e k"],
    bias_e: Float[Tensor, " e"] | None = None,
    activation: str | None = None,
    *,
    initial_window: Float[Tensor, "s e w"] | None = None,
    return_final_window: bool = False,
    seq_idx: Int[Tensor, "b l"] | None = None,
    cu_seqlens: Int[Tensor, " s1"] | None = None,
    reverse: bool = False,
    backend: str | None = None,
) -> Float[Tensor, "b l e"] | tuple[Float[Tensor, "b l e"], Float[Tensor, "s e w"]]:
    """Convolve each channel with its own kernel over the past. Differentiable in every tensor.

    Args:
        x_ble: the input, (b, l, e).
        weight_ek: one kernel of width k a channel, (e, k); the last column meets the present.
        bias_e: (e,).
        activation: None, or "silu" ("swish" is the same).
        initial_window: the inputs before the first, oldest first, (b, e, w) with w >= k - 1, of
            which the last k - 1 count; zeros when None.
        return_final_window: whether to return the last w inputs as well (w = k when no window
            was given), older ones from the initial window: what the next call starts from.
        seq_idx: (b, l) integers; the window restarts from zeros where they change. Windows
            belong to rows.
        cu_seqlens: (s + 1,) offsets of s sequences packed in one row. Windows belong to
            sequences: (s, e, w).
        reverse: look at the future instead, walking from the last position to the first. The
            window then holds what stands behind the last position, farthest first.
        backend: a choice for this call alone, see `anymamba.ops.backend`.

    Returns:
        y_ble in the type of x, and with return_final_window the final window in the type of x.

    Raises:
        InputError: a shape does not fit the others, or the activation is unknown.
        BackendError: the chosen backend cannot run the call.

    Example:
        >>> import torch
        >>> from anymamba.ops import causal_conv1d
        >>> x = torch.tensor([[[1.0], [2.0], [3.0]]])
        >>> causal_conv1d(x, torch.tensor([[10.0, 1.0]])).flatten().tolist()
        [1.0, 12.0, 23.0]
    """
    check_axes("causal_conv1d", ("an input", x_ble, "b, l, e"), ("a weight", weight_ek, "e, k"))
    (b, l, e), k = x_ble.shape, weight_ek.shape[1]
    if k < 1:
        raise InputError("causal_conv1d: the weight has no column, expected a width of 1 or more")
    check_shape("causal_conv1d", "weight", weight_ek, (e, k))
    check_shape("causal_conv1d", "bias", bias_e, (e,))
    check_activation("causal_conv1d", activation)
    segments = segments_of((b, l), seq_idx, cu_seqlens, reverse)
    _check_window(initial_window, count_states(segments, b), e, k)
    initial_window = copy_for_backward(initial_window)
    inputs = (x_ble, weight_ek, bias_e, activation)
    arguments = ConvArguments(*inputs, initial_window, return_final_window, segments, reverse)
    y_ble, final_window = implementation("causal_conv1d", arguments, backend)(arguments)
    return (y_ble, final_window) if return_final_window else y_ble


def causal_conv1d_update(
    x_be: Float[Tensor, "b e"],
    window_bek: Float[Tensor, "b e k"],
    weight_ek: Float[Tensor, "e k"],
    bias_e: Float[Tensor, " e"] | None = None,
    activation: str | None = None,
    *,
    backend: str | None = None,
) -> Float[Tensor, "b e"]:
    """One step of the causal convolution: shifts the window in place, has no gradient.

    Args:
        x_be: the present input, (b, e).
        window_bek: the last k inputs, oldest first, (b, e, k); x is appended to it.
        weight_ek, bias_e, activation: as in `causal_conv1d`.
        backend: a choice for this call alone.

    Returns:
        y_be in the type of x.

    Raises:
        InputError: a shape does not fit the others, or the activation is unknown.

    Example:
        >>> import torch
        >>> from anymamba.ops import causal_conv1d_update
        >>> window = torch.tensor([[[1.0, 2.0]]])
        >>> y = causal_conv1d_update(torch.tensor([[3.0]]), window, torch.tensor([[10.0, 1.0]]))
        >>> y.tolist(), window.tolist()
        ([[23.0]], [[[2.0, 3.0]]])
    """
    check_axes("causal_conv1d_update", ("an input", x_be, "b, e"), ("a weight", weight_ek, "e, k"))
    (b, e), k = x_be.shape, weight_ek.shape[1]
    check_shape("causal_conv1d_update", "weight", weight_ek, (e, k))
    check_shape("causal_conv1d_update", "window", window_bek, (b, e, k))
    check_shape("causal_conv1d_update", "bias", bias_e, (e,))
    check_activation("causal_conv1d_update", activation)
    arguments = ConvStepArguments(x_be, window_bek, weight_ek, bias_e, activation)
    return cast(Tensor, implementation("causal_conv1d_update", arguments, backend)(arguments))


def _check_window(window: Tensor | None, n_windows: int, e: int, k: int) -> None:
    if window is None:
        return
    if window.ndim != 3 or window.shape[:2] != (n_windows, e) or window.shape[2] < k - 1:
        raise InputError(
            f"causal_conv1d: initial_window has shape {tuple(window.shape)}, expected "
            f"({n_windows}, {e}, {k - 1} or more)"
        )
