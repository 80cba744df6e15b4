"""The causal convolution on CUDA through the kernels of the `causal_conv1d` package."""

from __future__ import annotations

from torch import Tensor

from anymamba.ops.segments import Segments
from anymamba.upstream import import_original

__all__ = ["causal_conv1d", "causal_conv1d_update"]

# The drop-in may stand under the package's name, and would come back here.
kernels = import_original("causal_conv1d")


def causal_conv1d(
    x_ble: Tensor,
    weight_ek: Tensor,
    bias_e: Tensor | None,
    activation: str | None,
    initial_window: Tensor | None,
    return_final_window: bool,
    segments: Segments | None,
    reverse: bool,
) -> tuple[Tensor, None]:
    """Arguments and returns as in `anymamba.ops.causal_conv1d`, less what it cannot do."""
    y_bel = kernels.causal_conv1d_fn(
        x_ble.transpose(1, 2), weight_ek, bias_e, activation=activation
    )
    return y_bel.transpose(1, 2), None


def causal_conv1d_update(
    x_be: Tensor,
    window_bek: Tensor,
    weight_ek: Tensor,
    bias_e: Tensor | None,
    activation: str | None,
) -> Tensor:
    """Arguments and returns as in `anymamba.ops.causal_conv1d_update`."""
    y_be: Tensor = kernels.causal_conv1d_update(x_be, window_bek, weight_ek, bias_e, activation)
    return y_be
