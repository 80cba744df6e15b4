"""The selective scan on CUDA through the kernels of the `mamba_ssm` package.

That package puts channels before time, (b, e, l); a transposed view serves without a copy.
"""

from __future__ import annotations

from torch import Tensor

from anymamba.ops.scan.arguments import ScanArguments, StepArguments
from anymamba.upstream import import_original

# The drop-in may stand under the package's name, and would come back here.
scan_kernels = import_original("mamba_ssm.ops.selective_scan_interface")
update_kernels = import_original("mamba_ssm.ops.triton.selective_state_update")


def selective_scan(arguments: ScanArguments) -> tuple[Tensor, Tensor | None]:
    """Arguments and returns as in `anymamba.ops.selective_scan`, less what it cannot do."""
    x_ble, delta_ble, A_en, B_bln, C_bln, D_e, z_ble, delta_bias_e, softplus = arguments[:9]
    result = scan_kernels.selective_scan_fn(
        x_ble.transpose(1, 2),
        delta_ble.to(x_ble.dtype).transpose(1, 2),
        A_en.float(),
        _state_before_time(B_bln),
        _state_before_time(C_bln),
        None if D_e is None else D_e.float(),
        None if z_ble is None else z_ble.transpose(1, 2),
        None if delta_bias_e is None else delta_bias_e.float(),
        softplus,
        arguments.return_last_state,
    )
    y_bel, last_ben = result if arguments.return_last_state else (result, None)
    return y_bel.transpose(1, 2), last_ben


def selective_state_update(arguments: StepArguments) -> Tensor:
    """Arguments and returns as in `anymamba.ops.selective_state_update`."""
    x_be, delta_be, A_en, B_bn, C_bn, D_e, z_be, delta_bias_e, softplus, state_ben = arguments
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
        softplus,
    )
    return y_be


def _state_before_time(B_bln: Tensor) -> Tensor:
    return B_bln.transpose(1, 2) if B_bln.ndim == 3 else B_bln.permute(0, 2, 3, 1)
