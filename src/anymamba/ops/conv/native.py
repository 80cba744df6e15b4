"""The causal convolution on a CPU through the native core, as PyTorch operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anymamba.ops.conv import reference
from anymamba.ops.conv.arguments import ConvArguments, ConvStepArguments
from anymamba.ops.custom_operator import Recurrence, define_update
from anymamba.ops.native import core, handed, in_float32, segment_table
from anymamba.ops.segments import count_states


def causal_conv1d(arguments: ConvArguments) -> tuple[Tensor, Tensor]:
    """Arguments and returns as in `anymamba.ops.causal_conv1d`."""
    x_ble, weight_ek, bias_e, activation, window, _, segments, reverse = arguments
    y_ble, final_window = _conv(
        x_ble,
        in_float32(weight_ek),
        in_float32(bias_e),
        # The reference rounds a window to the input's type before it is used, and so do we.
        None if window is None else window.to(x_ble.dtype),
        segment_table(segments),
        count_states(segments, x_ble.shape[0]),
        activation is not None,
        reverse,
    )
    return y_ble, final_window


@torch.no_grad()
def causal_conv1d_update(arguments: ConvStepArguments) -> Tensor:
    """Arguments and returns as in `anymamba.ops.causal_conv1d_update`."""
    x_be, window_bek, weight_ek, bias_e, activation = arguments
    weight_ek, bias_e = in_float32(weight_ek), in_float32(bias_e)
    y_be: Tensor = _conv_step(x_be, window_bek, weight_ek, bias_e, activation is not None)
    return y_be


class _Inputs(NamedTuple):
    x: Tensor  # (b, l, e)
    weight: Tensor  # (e, k)
    bias: Tensor | None  # (e,)
    initial: Tensor | None  # (n_states, e, w)
    segments: Tensor | None  # (5, s)
    n_states: int
    silu: bool
    reverse: bool

    def for_core(self) -> tuple[Any, ...]:
        """As the core takes them."""
        *tensors, initial = (handed(tensor) for tensor in self[:4])
        return *tensors, self.silu, initial, self.segments, self.n_states, self.reverse


def _allocate(inputs: _Inputs) -> tuple[Tensor, Tensor]:
    columns = (inputs.weight if inputs.initial is None else inputs.initial).shape[-1]
    x = inputs.x
    return torch.empty_like(x), x.new_empty(inputs.n_states, x.shape[2], columns)


def _forward(inputs: _Inputs, outputs: tuple[Tensor, Tensor]) -> None:
    core().conv(*inputs.for_core(), *outputs)


def _backward(
    inputs: _Inputs, _: Sequence[Tensor], dy: Tensor, dfinal: Tensor | None, gradients: Any
) -> None:
    dfinal = None if dfinal is None else dfinal.detach().float()
    core().conv_backward(*inputs.for_core(), dy.detach(), dfinal, *gradients)


def _reference(inputs: _Inputs) -> tuple[Tensor, Tensor]:
    return reference.causal_conv1d_of_operator(*inputs)


_conv = Recurrence(
    "causal_conv1d",
    _Inputs,
    allocate=_allocate,
    forward=_forward,
    backward=_backward,
    reference=_reference,
    in_float32=("initial",),
).operator


def _step(x: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    y = torch.empty_like(x)
    core().conv_step(handed(x), handed(window), handed(weight), handed(bias), silu, handed(y))
    return y


_conv_step = define_update("causal_conv1d_update", _step, state=1, x=0)
