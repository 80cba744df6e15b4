"""A layer's causal convolution and activation, over a sequence and for one step.

Both modules are read where their weights say what they compute, and called where something else
stands in their place. A window is the convolution's last k inputs, oldest first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anymamba import ops
from anymamba.ops.direct import conv_step
from anymamba.ops.fusable import computes, why_not_fusable
from anymamba.ops.segments import count_states, segments_of, walk_segments


def convolve(
    conv1d: Any,
    act: nn.Module | None,
    x_ble: Tensor,
    window: Tensor | None = None,
    *,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Convolve each channel with its own kernel over the past, then activate.

    Args:
        conv1d: the depthwise `nn.Conv1d` with padding k - 1, or what has taken its place.
        act: the activation; None for none.
        x_ble: (b, l, e).
        window: the inputs before the first, (b, e, k), or (s, e, k) with cu_seqlens; zeros if None.
        seq_idx: (b, l) integers; the window restarts from zeros where they change. Where they are
            negative, the output is zero.
        cu_seqlens: (s + 1,) offsets of s sequences packed in one row.

    Returns:
        (b, l, e), and the windows after the last inputs where `window` is given, else None.
    """
    silu = act is not None and computes(act, "silu")
    if why_not_fusable(conv1d, nn.Conv1d) is not None:
        y_ble, last = _called(conv1d, x_ble, window, seq_idx, cu_seqlens)
        silu = False
    else:
        convolved: Any = ops.causal_conv1d(
            x_ble,
            conv1d.weight[:, 0],
            conv1d.bias,
            "silu" if silu else None,
            initial_window=window,
            return_final_window=window is not None,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
        )
        y_ble, last = convolved if window is not None else (convolved, None)
    if act is not None and not silu:
        y_ble = act(y_ble)
    if seq_idx is not None:
        y_ble = y_ble.masked_fill((seq_idx < 0)[..., None], 0)
    return y_ble, last


def _called(
    conv1d: nn.Module,
    x_ble: Tensor,
    window: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The convolution through its forward, called once for each packed sequence."""
    segments = segments_of(x_ble.shape[:2], seq_idx, cu_seqlens, reverse=False)
    k = 0 if window is None else window.shape[2]

    def call(row: slice, steps: slice, window_bek: Tensor) -> tuple[Tensor, Tensor]:
        inputs_bel = x_ble[row, steps].transpose(1, 2)
        if k:
            inputs_bel = torch.cat([window_bek.to(x_ble.dtype), inputs_bel], 2)
        length = inputs_bel.shape[2]
        if not length:
            return x_ble[row, steps], window_bek
        y_ble = conv1d(inputs_bel)[..., k:length].transpose(1, 2)
        return y_ble, inputs_bel[..., length - k :]

    count = count_states(segments, x_ble.shape[0])
    windows = x_ble.new_empty(count, x_ble.shape[2], 0) if window is None else window
    y_ble, last = walk_segments(call, x_ble, windows, segments)
    return y_ble, None if window is None else last


def convolve_step(conv1d: Any, act: nn.Module | None, x_be: Tensor, window_bek: Tensor) -> Tensor:
    """One step of `convolve`. Has no gradient.

    Args:
        conv1d, act: as in `convolve`.
        x_be: (b, e).
        window_bek: (b, e, k); x is appended to it in place.

    Returns:
        (b, e).
    """
    if why_not_fusable(conv1d, nn.Conv1d) is not None:
        return _called_step(conv1d, act, x_be, window_bek)
    silu = "silu" if act is not None and computes(act, "silu") else None
    arguments = (x_be, window_bek, conv1d.weight[:, 0], conv1d.bias, silu)
    y_be = conv_step(*arguments)
    y_be = ops.causal_conv1d_update(*arguments) if y_be is None else y_be
    return y_be if act is None or silu else act(y_be)


@torch.no_grad()
def _called_step(
    conv1d: nn.Module, act: nn.Module | None, x_be: Tensor, window_bek: Tensor
) -> Tensor:
    window_bek.copy_(torch.cat([window_bek[..., 1:], x_be[..., None]], dim=-1))
    # Of the outputs over the padded window, the one that sees it whole.
    y_be: Tensor = conv1d(window_bek.to(x_be.dtype))[..., window_bek.shape[2] - 1]
    return y_be if act is None else act(y_be)


def last_inputs(x_ble: Tensor, k: int, seq_idx: Tensor | None = None) -> Tensor:
    """The window after x where nothing stood before it: (b, e, k).

    Args:
        x_ble: (b, l, e).
        k: the width of the convolution.
        seq_idx: (b, l); only inputs of the row's last sequence count.

    Example:
        >>> last_inputs(torch.tensor([[[1.0], [2.0]]]), 3).tolist()
        [[[0.0, 1.0, 2.0]]]
    """
    x_ble = x_ble.detach()
    if seq_idx is not None:
        x_ble = x_ble * (seq_idx == seq_idx[:, -1:])[..., None]
    return F.pad(x_ble.transpose(1, 2), (k - x_ble.shape[1], 0))
