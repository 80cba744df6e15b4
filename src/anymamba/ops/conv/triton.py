"""The causal convolution through Triton, as PyTorch operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anymamba.ops.conv import reference
from anymamba.ops.conv.arguments import ConvArguments, ConvStepArguments
from anymamba.ops.conv.triton_kernels import convolve, convolve_backward, convolve_step
from anymamba.ops.conv.triton_window_kernels import final_windows, windows_backward
from anymamba.ops.custom_operator import Recurrence, define_update
from anymamba.ops.flops import register_flops
from anymamba.ops.native import segment_table
from anymamba.ops.segments import count_states
from anymamba.ops.triton import MOST_TAPS, launch_options, on_device_of, strides, tile_side

_STEPS, _CHANNELS = 32, 64  # of a tile
# A backward tile leaves a sum a tap and channel, so it is longer and not as wide.
_BACKWARD_STEPS, _BACKWARD_CHANNELS = 128, 32


def causal_conv1d(arguments: ConvArguments) -> tuple[Tensor, Tensor]:
    """Arguments and returns as in `anymamba.ops.causal_conv1d`; no window if none is wanted."""
    x_ble, weight_ek, bias_e, activation, window, wants_window, segments, reverse = arguments
    table = segment_table(segments)
    y_ble, final_window = _conv(
        x_ble,
        weight_ek,
        bias_e,
        # The reference rounds a window to the input's type before it is used, and so do we.
        None if window is None else window.to(x_ble.dtype),
        None if table is None else table.to(x_ble.device),
        count_states(segments, x_ble.shape[0]),
        activation is not None,
        reverse,
        wants_window,
    )
    return y_ble, final_window


@torch.no_grad()
def causal_conv1d_update(arguments: ConvStepArguments) -> Tensor:
    """Arguments and returns as in `anymamba.ops.causal_conv1d_update`."""
    x_be, window_bek, weight_ek, bias_e, activation = arguments
    y_be: Tensor = _conv_step(x_be, window_bek, weight_ek, bias_e, activation is not None)
    return y_be


class _Inputs(NamedTuple):
    x: Tensor  # (b, l, e)
    weight: Tensor  # (e, k)
    bias: Tensor | None  # (e,)
    initial: Tensor | None  # (n_states, e, w)
    segments: Tensor | None  # (5, s), where x is
    n_states: int
    silu: bool
    reverse: bool
    wants_window: bool

    @property
    def k(self) -> int:
        return self.weight.shape[1]

    @property
    def columns(self) -> int:
        return (self.weight if self.initial is None else self.initial).shape[-1]

    @property
    def n_segments(self) -> int:
        return self.x.shape[0] if self.segments is None else self.segments.shape[1]

    def owner(self) -> Tensor | None:
        """The segment of each position, (b * l,); segments follow each other without gaps."""
        if self.segments is None:
            return None
        length, device = self.x.shape[1], self.x.device
        ends = self.segments[0] * length + self.segments[2]
        positions = torch.arange(self.x.shape[0] * length, device=device)
        return torch.searchsorted(ends, positions, right=True, out_int32=True)


def _allocate(inputs: _Inputs) -> tuple[Tensor, Tensor]:
    x = inputs.x
    n_windows = inputs.n_states if inputs.wants_window else 0
    return torch.empty_like(x), x.new_empty(n_windows, x.shape[2], inputs.columns)


def _forward(inputs: _Inputs, outputs: tuple[Tensor, Tensor]) -> None:
    x, _, _, initial, segments, *_ = inputs
    y, final = outputs
    with on_device_of(x):
        _convolve(inputs, inputs.owner(), y)
        if final.numel() == 0:
            return
        block_e = tile_side(x.shape[2], _CHANNELS)
        final_windows[(inputs.n_segments, -(-x.shape[2] // block_e))](
            x,
            initial,
            segments,
            final,
            *x.shape[1:],
            inputs.columns,
            inputs.n_segments,
            *x.stride(),
            *strides(initial, 3),
            REVERSE=inputs.reverse,
            BLOCK_E=block_e,
            **launch_options(1),
        )


def _convolve(inputs: _Inputs, owner: Tensor | None, y: Tensor) -> None:
    x, weight, bias, initial, segments, _, silu, reverse, _ = inputs
    b, length, e = x.shape
    if x.numel() == 0:
        return
    block_t, block_e = tile_side(length, _STEPS), tile_side(e, _CHANNELS)
    tiles = -(-length // block_t)
    convolve[(b * tiles, -(-e // block_e))](
        x,
        weight,
        bias,
        initial,
        owner,
        segments,
        y,
        length,
        e,
        inputs.columns,
        inputs.n_segments,
        tiles,
        *x.stride(),
        *weight.stride(),
        *strides(bias, 1),
        *strides(initial, 3),
        *y.stride(),
        SILU=silu,
        REVERSE=reverse,
        K=inputs.k,
        TAPS=tile_side(inputs.k, MOST_TAPS),
        BLOCK_T=block_t,
        BLOCK_E=block_e,
        **launch_options(4),
    )


def _backward(
    inputs: _Inputs, _: Sequence[Tensor], dy: Tensor, dfinal: Tensor | None, gradients: Any
) -> None:
    dx, dweight, dbias, dinitial = gradients
    # What was not returned has a gradient of no elements, or none.
    dfinal = dfinal if inputs.wants_window else None
    owner = inputs.owner()
    with on_device_of(inputs.x):
        dtotal = _backward_of_weights(inputs, owner, dy, dweight, dbias)
        # An input meets the steps after it, so its gradient is a convolution the other way round.
        back = inputs._replace(
            x=dtotal, bias=None, initial=None, silu=False, reverse=not inputs.reverse
        )
        _convolve(back, owner, dx)
        if dinitial is not None or dfinal is not None:
            _backward_of_windows(inputs, dtotal, dfinal, dinitial, dx)


def _backward_of_weights(
    inputs: _Inputs, owner: Tensor | None, dy: Tensor, dweight: Tensor, dbias: Tensor | None
) -> Tensor:
    """Fills the gradients of weight and bias, returns that of the sum before SiLU."""
    x, weight, bias, initial, segments, _, silu, reverse, _ = inputs
    (b, length, e), k = x.shape, inputs.k
    # In x's type, as any gradient between two operators would be: half the traffic in half
    # precision, where this is the most of it.
    dtotal = torch.empty(x.shape, dtype=x.dtype, device=x.device) if silu else dy
    block_t, block_e = tile_side(length, _BACKWARD_STEPS), tile_side(e, _BACKWARD_CHANNELS)
    tiles = -(-length // block_t)
    sums = torch.empty(b * tiles, k + 1, e, dtype=torch.float32, device=x.device)
    if x.numel() != 0:
        convolve_backward[(b * tiles, -(-e // block_e))](
            x,
            weight,
            bias,
            initial,
            owner,
            segments,
            dy,
            dtotal,
            sums,
            length,
            e,
            inputs.columns,
            inputs.n_segments,
            tiles,
            *x.stride(),
            *weight.stride(),
            *strides(bias, 1),
            *strides(initial, 3),
            *dy.stride(),
            SILU=silu,
            REVERSE=reverse,
            K=k,
            TAPS=tile_side(k, MOST_TAPS),
            BLOCK_T=block_t,
            BLOCK_E=block_e,
            **launch_options(8),
        )
    summed = sums.sum(0)
    dweight.copy_(summed[:k].t())
    if dbias is not None:
        dbias.copy_(summed[k])
    return dtotal


def _backward_of_windows(
    inputs: _Inputs, dtotal: Tensor, dfinal: Tensor | None, dinitial: Tensor | None, dx: Tensor
) -> None:
    length, e = dx.shape[1:]
    if inputs.n_segments == 0 or e == 0:
        return
    block_e = tile_side(e, _CHANNELS)
    windows_backward[(inputs.n_segments, -(-e // block_e))](
        inputs.weight,
        inputs.segments,
        dtotal,
        dfinal,
        dinitial,
        dx,
        length,
        e,
        inputs.columns,
        inputs.n_segments,
        *inputs.weight.stride(),
        *dtotal.stride(),
        *strides(dfinal, 3),
        REVERSE=inputs.reverse,
        K=inputs.k,
        BLOCK_E=block_e,
        **launch_options(1),
    )


def _reference(inputs: _Inputs) -> tuple[Tensor, Tensor]:
    y, final = reference.causal_conv1d_of_operator(*inputs[:-1])
    return y, final if inputs.wants_window else final[:0]


_conv = Recurrence(
    "causal_conv1d_triton",
    _Inputs,
    allocate=_allocate,
    forward=_forward,
    backward=_backward,
    reference=_reference,
    in_float32=("initial",),
    device_types=None,
).operator


def _step(x: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    y = torch.empty_like(x)
    (b, e), k = x.shape, weight.shape[1]
    if x.numel() == 0:
        return y
    block_e = tile_side(e, _CHANNELS)
    with on_device_of(x):
        convolve_step[(b, -(-e // block_e))](
            x,
            window,
            weight,
            bias,
            y,
            e,
            *x.stride(),
            *window.stride(),
            *weight.stride(),
            *strides(bias, 1),
            *y.stride(),
            SILU=silu,
            K=k,
            TAPS=tile_side(k, at_most=1 << 20),
            BLOCK_E=block_e,
            **launch_options(2),
        )
    return y


_conv_step = define_update("causal_conv1d_update_triton", _step, state=1, x=0, device_types=None)
register_flops("_triton")
