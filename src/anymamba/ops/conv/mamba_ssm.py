"""The causal convolution on CUDA through the kernels of the `causal_conv1d` package."""

from __future__ import annotations

from torch import Tensor

from anymamba.ops.conv.arguments import ConvArguments, ConvStepArguments
from anymamba.upstream import import_original

# The drop-in may stand under the package's name, and would come back here.
kernels = import_original("causal_conv1d")


def causal_conv1d(arguments: ConvArguments) -> tuple[Tensor, None]:
    """Arguments and returns as in `anymamba.ops.causal_conv1d`, less what it cannot do."""
    x_ble, weight_ek, bias_e, activation, *_ = arguments
    x_bel = x_ble.transpose(1, 2)
    y_bel = kernels.causal_conv1d_fn(x_bel, weight_ek, bias_e, activation=activation)
    return y_bel.transpose(1, 2), None


def causal_conv1d_update(arguments: ConvStepArguments) -> Tensor:
    """Arguments and returns as in `anymamba.ops.causal_conv1d_update`."""
    y_be: Tensor = kernels.causal_conv1d_update(*arguments)
    return y_be
