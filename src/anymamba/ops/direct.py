"""One step of plain CPU tensors, straight to the native core.

The arithmetic of one token takes microseconds. So do the choice of a backend, checks that name
what does not fit, and PyTorch's dispatcher; a call that needs none of them can go past them.
"""

from __future__ import annotations

from torch import Tensor

from anymamba.ops.backends import native_is_chosen
from anymamba.ops.checks import ACTIVATIONS
from anymamba.ops.conv.arguments import ConvStepArguments
from anymamba.ops.conv.native import causal_conv1d_update
from anymamba.ops.native import TYPES
from anymamba.ops.scan.arguments import StepArguments
from anymamba.ops.scan.native import selective_state_update
from anymamba.ops.tracing import PLAIN_TYPES, runs_now


def scan_step(
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
) -> Tensor | None:
    """`anymamba.ops.selective_state_update`, if the core can take the call as it is.

    Returns:
        y_be, or None where nothing was done: the tensors do not fit or are not plain, another
        backend is chosen, or something watches. The general function then answers or explains.

    Example:
        >>> import torch
        >>> state, x, B = torch.zeros(1, 2, 3), torch.ones(1, 2), torch.ones(1, 3)
        >>> scan_step(state, x, x, -torch.ones(2, 3), B, B, None, None, None, False)
        tensor([[3., 3.]])
    """
    tensors = (x_be, state_ben, delta_be, A_en, B_bn, C_bn, D_e, z_be, delta_bias_e)
    if not _is_plain(*tensors) or x_be.ndim != 2:
        return None
    e, shape = x_be.shape[1], x_be.shape
    fits = (
        delta_be.shape == shape
        and (z_be is None or z_be.shape == shape)
        and state_ben.shape == (shape[0], *A_en.shape)
        and state_ben.shape == (*shape, B_bn.shape[-1])
        and B_bn.shape == C_bn.shape == (shape[0], state_ben.shape[2])
        and all(vector is None or vector.shape == (e,) for vector in (D_e, delta_bias_e))
    )
    if not fits:
        return None
    return selective_state_update(
        StepArguments(
            x_be, delta_be, A_en, B_bn, C_bn, D_e, z_be, delta_bias_e, delta_softplus, state_ben
        )
    )


def conv_step(
    x_be: Tensor,
    window_bek: Tensor,
    weight_ek: Tensor,
    bias_e: Tensor | None,
    activation: str | None,
) -> Tensor | None:
    """`anymamba.ops.causal_conv1d_update`, if the core can take the call as it is.

    Returns:
        y_be, or None where nothing was done, as in `scan_step`.

    Example:
        >>> import torch
        >>> window = torch.tensor([[[1.0, 2.0]]])
        >>> conv_step(torch.tensor([[3.0]]), window, torch.tensor([[10.0, 1.0]]), None, None)
        tensor([[23.]])
    """
    if not _is_plain(x_be, window_bek, weight_ek, bias_e) or weight_ek.ndim != 2:
        return None
    e, k = weight_ek.shape
    fits = (
        x_be.ndim == 2
        and x_be.shape[1] == e
        and window_bek.shape == (x_be.shape[0], e, k)
        and (bias_e is None or bias_e.shape == (e,))
        and activation in ACTIVATIONS
    )
    if not fits:
        return None
    return causal_conv1d_update(ConvStepArguments(x_be, window_bek, weight_ek, bias_e, activation))


def _is_plain(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the core, which is chosen, can read all tensors, and nothing watches the call."""
    if not runs_now(x) or not native_is_chosen():
        return False
    return all(
        tensor is None or (type(tensor) in PLAIN_TYPES and tensor.is_cpu and tensor.dtype in TYPES)
        for tensor in (x, *others)
    )
