"""The selective scan on CUDA through the kernels of the `mamba_ssm` package.

That package puts channels before time, (b, e, l); a transposed view serves without a copy.
"""

from __future__ import annotations

from torch import Tensor

from anymamba.ops.segments import Segments
from anymamba.upstream import import_original

__all__ = ["selective_scan", "selective_state_update"]

# The drop-in may stand under the package's name, and would come back here.
scan_kernels = import_original("mamba_ssm.ops.selective_scan_interface")
update_kernels = import_original("mamba_ssm.ops.triton.selective_state_update")


def selective_scan(
    x_ble: Tensor,
    delta_ble: Tensor,
    A_en: Tensor,
    B_bln: Tensor,
    C_bln: Tensor,
    D_e: Tensor | None,
    z_ble: Tensor | None,
    delta_bias_e: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    return_last_state: bool,
    segments: Segments | None,
    reverse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Arguments and returns as in `anymamba.ops.selective_scan`, less what it cannot do."""
    result = scan_kernels.selective_scan_fn(
        x_ble.transpose(1, 2),
        delta_ble.to(x_ble.dtype).transpose(1, 2),
        A_en.float(),
        _state_before_time(B_bln),
        _state_before_time(C_bln),
        None if D_e is None else D_e.float(),
        None if z_ble is None else z_ble.transpose(1, 2),
        None if delta_bias_e is None else delta_bias_e.float(),
        delta_softplus,
        return_last_state,
    )
    y_bel, last_ben = result if return_last_state else (result, None)
    return y_bel.transpose(1, 2), last_ben


def selective_state_update(
    state_ben: Tensor,
    x_be: Tensor,
    delta_be: Tensor,
    A_en: Tensor,
    B_bn: Tensor,
    C_bn: Tensor,
    D_e: Tensor | None,
    z_be: Tensor | None,
    delta_bias_e: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """Arguments and returns as in `anymamba.ops.selective_state_update`."""
    y_be: Tensor = update_kernels.selective_state_update(
        state_ben,
        x_be,
        delta_be,
        A_en.float(),
        B_bn,
        C_bn,
        None if D_e is None else D_e.float(),
        z_be,
        None if delta_bias_e is None else delta_bias_e.float(),
        delta_softplus,
    )
    return y_be


def _state_before_time(B_bln: Tensor) -> Tensor:
    return B_bln.transpose(1, 2) if B_bln.ndim == 3 else B_bln.permute(0, 2, 3, 1)
