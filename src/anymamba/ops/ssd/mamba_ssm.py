"""The state space duality on CUDA through the Triton kernels of the `mamba_ssm` package."""

from __future__ import annotations

import torch
from torch import Tensor

from anymamba.ops.ssd.arguments import SsdArguments, SsdStepArguments
from anymamba.upstream import import_original

# The drop-in may stand under the package's name, and would come back here.
chunk_kernels = import_original("mamba_ssm.ops.triton.ssd_combined")
update_kernels = import_original("mamba_ssm.ops.triton.selective_state_update")

# What the package's own layers choose.
CHUNK_STEPS = 256


def ssd(arguments: SsdArguments) -> tuple[Tensor, Tensor | None]:
    """Arguments and returns as in `anymamba.ops.ssd`, less what it cannot do."""
    x, dt, A, B, C, D, z, dt_bias, softplus, limit, initial, wants_last, _, steps = arguments
    result = chunk_kernels.mamba_chunk_scan_combined(
        x,
        dt,
        A.float(),
        B,
        C,
        steps or CHUNK_STEPS,
        D=None if D is None else D.float(),
        z=z,
        dt_bias=None if dt_bias is None else dt_bias.float(),
        initial_states=initial,
        dt_softplus=softplus,
        dt_limit=limit,
        return_final_states=wants_last,
    )
    y, last = result if wants_last else (result, None)
    return y, last


def ssd_state_update(arguments: SsdStepArguments) -> Tensor:
    """Arguments and returns as in `anymamba.ops.ssd_state_update`.

    The kernel is the one of the selective scan, with heads. It sees by strides of 0 that the
    channels of a head share dt, A and the bias, and then reads these once. It asks for the strides
    of a bias that is None, too, so that it gets zeros instead.
    """
    x, dt, A, B, C, D, z, dt_bias, softplus, _, state = arguments
    (h, p), n = x.shape[1:], state.shape[-1]
    D_hp = D[:, None].expand(h, p) if D is not None and D.ndim == 1 else D
    bias_h = A.new_zeros(h, dtype=torch.float32) if dt_bias is None else dt_bias.float()
    y: Tensor = update_kernels.selective_state_update(
        state,
        x,
        dt[..., None].expand(-1, h, p),
        A.float()[:, None, None].expand(h, p, n),
        B,
        C,
        D=None if D_hp is None else D_hp.float(),
        z=z,
        dt_bias=bias_h[:, None].expand(h, p),
        dt_softplus=softplus,
    )
    return y
