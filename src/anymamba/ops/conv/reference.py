"""The causal depthwise convolution in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from anymamba.ops.conv.arguments import ConvArguments, ConvStepArguments
from anymamba.ops.segments import count_states, segments_from_table, walk_segments


def causal_conv1d(arguments: ConvArguments) -> tuple[Tensor, Tensor]:
    """Arguments and returns as in `anymamba.ops.causal_conv1d`."""
    x_ble, weight_ek, bias_e, activation, windows, _, segments, reverse = arguments
    b, _l, e = x_ble.shape
    if windows is None:
        windows = x_ble.new_zeros(count_states(segments, b), e, weight_ek.shape[1])

    def walk(row: slice, steps: slice, window: Tensor) -> tuple[Tensor, Tensor]:
        x = x_ble[row, steps]
        if not reverse:
            return _convolve(x, window, weight_ek, bias_e, activation)
        y, window = _convolve(x.flip(1), window, weight_ek, bias_e, activation)
        return y.flip(1), window

    return walk_segments(walk, x_ble, windows.to(x_ble.dtype), segments)


def causal_conv1d_of_operator(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    table: Tensor | None,
    n_states: int,
    silu: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """The same from the inputs of a custom operator, whose segments are a table."""
    segments = segments_from_table(table, n_states)
    activation = "silu" if silu else None
    return causal_conv1d(
        ConvArguments(x, weight, bias, activation, initial, True, segments, reverse)
    )


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
def causal_conv1d_update(arguments: ConvStepArguments) -> Tensor:
    """Arguments and returns as in `anymamba.ops.causal_conv1d_update`."""
    x_be, window_bek, weight_ek, bias_e, activation = arguments
    # A window narrower than the input rounds what it keeps, never the present input.
    window = window_bek.to(x_be.dtype)
    y_ble, window = _convolve(x_be[:, None], window, weight_ek, bias_e, activation)
    window_bek.copy_(window)
    return y_ble[:, 0]
