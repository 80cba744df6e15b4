"""The causal convolution on a CPU through the native core, as PyTorch operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anymamba.ops.conv import reference as conv_reference
from anymamba.ops.derivatives import register_second_derivatives
from anymamba.ops.native import core, handed, segment_table
from anymamba.ops.segments import Segments, segments_from_table
from anymamba.ops.tracing import runs_now

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
    y_ble, final_window = _conv(
        x_ble,
        weight_ek.float().contiguous(),
        None if bias_e is None else bias_e.float().contiguous(),
        # The reference rounds a window to the input's type before it is used, and so do we.
        None if initial_window is None else initial_window.to(x_ble.dtype),
        segment_table(segments),
        x_ble.shape[0] if segments is None else segments.n_states,
        activation is not None,
        reverse,
    )
    return y_ble, final_window


@torch.no_grad()
def causal_conv1d_update(
    x_be: Tensor,
    window_bek: Tensor,
    weight_ek: Tensor,
    bias_e: Tensor | None,
    activation: str | None,
) -> Tensor:
    """Arguments and returns as in `anymamba.ops.causal_conv1d_update`."""
    step = _conv_step_now if runs_now(x_be) else _conv_step
    y_be: Tensor = step(
        x_be,
        window_bek,
        weight_ek.float().contiguous(),
        None if bias_e is None else bias_e.float().contiguous(),
        activation is not None,
    )
    return y_be


@torch.library.custom_op("anymamba::causal_conv1d", mutates_args=(), device_types="cpu")
def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    segments: Tensor | None,
    n_states: int,
    silu: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    y, final = _outputs(x, weight, initial, n_states)
    inputs = [handed(t) for t in (x, weight, bias)]
    core().conv(*inputs, silu, handed(initial), segments, n_states, reverse, y, final)
    return y, final


def _outputs(
    x: Tensor, weight: Tensor, initial: Tensor | None, n_states: int
) -> tuple[Tensor, Tensor]:
    columns = weight.shape[1] if initial is None else initial.shape[2]
    return torch.empty_like(x), x.new_empty(n_states, x.shape[2], columns)


@_conv.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    segments: Tensor | None,
    n_states: int,
    silu: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    return _outputs(x, weight, initial, n_states)


@torch.library.custom_op("anymamba::causal_conv1d_backward", mutates_args=(), device_types="cpu")
def _conv_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    segments: Tensor | None,
    dy: Tensor,
    dfinal: Tensor | None,
    n_states: int,
    silu: bool,
    reverse: bool,
) -> list[Tensor]:
    """The gradients of x, weight, bias and initial window; empty where there is none."""
    gradients = _gradients(x, weight, bias, initial)
    dx, dweight, dbias, dinitial = gradients
    inputs = [handed(t) for t in (x, weight, bias)]
    core().conv_backward(
        *inputs,
        silu,
        handed(initial),
        segments,
        n_states,
        reverse,
        dy.detach(),
        None if dfinal is None else dfinal.detach().float(),
        dx,
        dweight,
        None if bias is None else dbias,
        None if initial is None else dinitial,
    )
    return gradients


def _gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None
) -> list[Tensor]:
    nothing = x.new_empty(0, dtype=torch.float32)
    return [
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        torch.empty_like(weight),
        nothing if bias is None else torch.empty_like(bias),
        nothing.clone()
        if initial is None
        else initial.new_empty(initial.shape, dtype=torch.float32),
    ]


@_conv_backward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    segments: Tensor | None,
    dy: Tensor,
    dfinal: Tensor | None,
    n_states: int,
    silu: bool,
    reverse: bool,
) -> list[Tensor]:
    return _gradients(x, weight, bias, initial)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, initial, segments, *options = inputs
    ctx.save_for_backward(x, weight, bias, initial, segments)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _go_back(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
    *tensors, segments = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(tensors[0])
    found = _conv_backward(*tensors, segments, dy, dfinal, *ctx.options)
    gradients = [
        None if tensor is None else gradient.to(tensor.dtype)
        for tensor, gradient in zip(tensors, found, strict=True)
    ]
    return (*gradients, None, None, None, None)


_conv.register_autograd(_go_back, setup_context=_keep)


def _again(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor]:
    segments, _, _, n_states, silu, reverse = arguments[4:]
    return conv_reference.causal_conv1d(
        x,
        weight,
        bias,
        "silu" if silu else None,
        initial,
        True,
        segments_from_table(segments, n_states),
        reverse,
    )


register_second_derivatives(_conv_backward, 4, slice(5, 7), _again)


def _conv_step_now(
    x: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> Tensor:
    y = torch.empty_like(x)
    core().conv_step(handed(x), handed(window), handed(weight), handed(bias), silu, handed(y))
    torch.autograd.graph.increment_version(window)
    return y


_conv_step = torch.library.custom_op(
    "anymamba::causal_conv1d_update",
    _conv_step_now,
    mutates_args=("window",),
    device_types="cpu",
)


@_conv_step.register_fake
def _(x: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    return torch.empty_like(x)
