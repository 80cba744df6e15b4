"""What every implementation of the causal convolution takes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from anymamba.ops.segments import Segments


class ConvArguments(NamedTuple):
    """The arguments of `anymamba.ops.causal_conv1d`, checked, with one mark of the packing."""

    x_ble: Tensor
    weight_ek: Tensor
    bias_e: Tensor | None = None
    activation: str | None = None
    initial_window: Tensor | None = None
    return_final_window: bool = False
    segments: Segments | None = None
    reverse: bool = False


class ConvStepArguments(NamedTuple):
    """The arguments of `anymamba.ops.causal_conv1d_update`."""

    x_be: Tensor
    window_bek: Tensor
    weight_ek: Tensor
    bias_e: Tensor | None = None
    activation: str | None = None
