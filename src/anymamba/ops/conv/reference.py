"""The causal depthwise convolution in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from anymamba.ops.segments import Segments

__all__ = ["causal_conv1d", "causal_conv1d_update"]


def causal_conv1d(
    x_ble: Tensor,
    weight_ek: Tensor,
    bias_e: Tensor | None,
    activation: str | None,
    initial_window: Tensor | None,
    return_final_window: bool,
    segments: Segments | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Arguments and returns as in `anymamba.ops.causal_conv1d`."""
    b, _, e = x_ble.shape
    windows = initial_window
    if windows is None:
        n_windows = b if segments is None else segments.n_states
        windows = x_ble.new_zeros(n_windows, e, weight_ek.shape[1])
    windows = windows.to(x_ble.dtype)

    def convolve(x_ble: Tensor, window_bew: Tensor) -> tuple[Tensor, Tensor]:
        if reverse:
            y_ble, window_bew = _convolve(x_ble.flip(1), window_bew, weight_ek, bias_e, activation)
            return y_ble.flip(1), window_bew
        return _convolve(x_ble, window_bew, weight_ek, bias_e, activation)

    if segments is None:
        return convolve(x_ble, windows)
    rows: list[list[Tensor]] = [[] for _ in range(b)]
    final = list(windows)
    empty = windows.new_zeros(1, *windows.shape[1:])
    for row, start, stop, window_in, window_out in segments:
        window = windows[window_in, None] if window_in >= 0 else empty
        y_ble, window = convolve(x_ble[row : row + 1, start:stop], window)
        rows[row].append(y_ble)
        if window_out >= 0:
            final[window_out] = window[0]
    y_ble = torch.cat([torch.cat(pieces, 1) if pieces else x_ble[:1] for pieces in rows])
    return y_ble, (torch.stack(final) if final else windows)


def _convolve(
    x_ble: Tensor,
    window_bew: Tensor,
    weight_ek: Tensor,
    bias_e: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x_ble.dtype, torch.float32)
    length, k = x_ble.shape[1], weight_ek.shape[1]
    past_and_present = torch.cat([window_bew, x_ble.transpose(1, 2)], 2)
    inputs = past_and_present[:, :, past_and_present.shape[2] - length - (k - 1) :].to(wide)
    y_bel = torch.zeros_like(inputs[:, :, :length])
    for tap in range(k):
        y_bel = y_bel + weight_ek[:, tap, None].to(wide) * inputs[:, :, tap : tap + length]
    if bias_e is not None:
        y_bel = y_bel + bias_e.to(wide)[:, None]
    if activation is not None:
        y_bel = F.silu(y_bel)
    final_window = past_and_present[:, :, past_and_present.shape[2] - window_bew.shape[2] :]
    return y_bel.transpose(1, 2).to(x_ble.dtype), final_window


@torch.no_grad()
def causal_conv1d_update(
    x_be: Tensor,
    window_bek: Tensor,
    weight_ek: Tensor,
    bias_e: Tensor | None,
    activation: str | None,
) -> Tensor:
    """Arguments and returns as in `anymamba.ops.causal_conv1d_update`."""
    # A window narrower than the input rounds what it keeps, never the present input.
    y_ble, window = _convolve(
        x_be[:, None], window_bek.to(x_be.dtype), weight_ek, bias_e, activation
    )
    window_bek.copy_(window)
    return y_ble[:, 0]
