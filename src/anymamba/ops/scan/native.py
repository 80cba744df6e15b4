"""The selective scan on a CPU through the native core, as PyTorch operators."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from anymamba.ops.derivatives import register_second_derivatives
from anymamba.ops.native import core, handed, segment_table
from anymamba.ops.scan import reference as scan_reference
from anymamba.ops.segments import Segments, segments_from_table
from anymamba.ops.tracing import runs_now

__all__ = ["selective_scan", "selective_state_update"]


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
) -> tuple[Tensor, Tensor]:
    """Arguments and returns as in `anymamba.ops.selective_scan`."""
    tensors = (
        x_ble,
        delta_ble,
        _float32(A_en),
        *_in_groups(B_bln, C_bln, x_ble.ndim),
        _float32(D_e),
        z_ble,
        _float32(delta_bias_e),
        _float32(initial_state),
    )
    will_go_back = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in tensors
    )
    y_ble, last, _ = _scan(
        *tensors,
        segment_table(segments),
        x_ble.shape[0] if segments is None else segments.n_states,
        delta_softplus,
        reverse,
        will_go_back,
    )
    return y_ble, last


@torch.no_grad()
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
    state = state_ben
    # Rows may lie apart, but each without gaps.
    if state.dtype != torch.float32 or not (state.is_contiguous() or state[:1].is_contiguous()):
        state = state.detach().to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    step = _scan_step_now if runs_now(x_be) else _scan_step
    y_be: Tensor = step(
        state,
        x_be,
        delta_be,
        _float32(A_en),
        *_in_groups(B_bn, C_bn, x_be.ndim),
        _float32(D_e),
        z_be,
        _float32(delta_bias_e),
        delta_softplus,
    )
    if state is not state_ben:
        state_ben.detach().copy_(state)
    return y_be


def _float32(tensor: Any) -> Any:
    return None if tensor is None else tensor.float().contiguous()


def _in_groups(B: Tensor, C: Tensor, axes_without_groups: int) -> tuple[Tensor, Tensor]:
    """B and C as (..., g, n) with the same g, which the core wants, whatever each came with."""
    if B.ndim == axes_without_groups:
        B = B.unsqueeze(-2)
    if C.ndim == axes_without_groups:
        C = C.unsqueeze(-2)
    groups = math.lcm(B.shape[-2], C.shape[-2])
    return _split_groups(B, groups), _split_groups(C, groups)


def _split_groups(B: Tensor, groups: int) -> Tensor:
    parts = groups // B.shape[-2]
    if parts == 1:
        return B
    return B[..., None, :].expand(*B.shape[:-1], parts, B.shape[-1]).flatten(-3, -2)


@torch.library.custom_op("anymamba::selective_scan", mutates_args=(), device_types="cpu")
def _scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial: Tensor | None,
    segments: Tensor | None,
    n_states: int,
    softplus: bool,
    reverse: bool,
    will_go_back: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last states, and what the backward pass needs (empty unless it will come)."""
    y, last, kept = _outputs(x, A, segments, n_states, will_go_back)
    used = _used(kept, x, A, segments, n_states) if will_go_back else None
    if used is not None:
        kept[used.numel() :].zero_()
    inputs = [handed(t) for t in (x, delta, A, B, C, D, z, delta_bias)]
    core().scan(
        *inputs,
        softplus,
        handed(initial),
        segments,
        n_states,
        reverse,
        y,
        last,
        used,
    )
    return y, last, kept


def _outputs(
    x: Tensor, A: Tensor, segments: Tensor | None, n_states: int, will_go_back: bool
) -> tuple[Tensor, Tensor, Tensor]:
    last = x.new_empty((n_states, *A.shape), dtype=torch.float32)
    (b, l, _), (e, n) = x.shape, A.shape
    steps = _chunk_steps()
    chunks = b * (-(-l // steps))
    if segments is not None:
        # As many as fit, and a last one of each segment: a size that its shapes alone decide.
        chunks = b * l // steps + segments.shape[1]
    kept = x.new_empty(chunks * e * n if will_go_back else 0, dtype=torch.float32)
    return torch.empty_like(x), last, kept


@cache
def _chunk_steps() -> int:
    """How many steps lie between two states that are kept for the backward pass."""
    many = 1 << 20
    chunks: int = core().scan_checkpoint_floats(1, many, 1, 1)
    return many // chunks


def _used(kept: Tensor, x: Tensor, A: Tensor, segments: Tensor | None, n_states: int) -> Tensor:
    """The part of the states kept for the backward pass that these segments fill."""
    floats = core().scan_checkpoint_floats(*x.shape, A.shape[1], segments, n_states)
    return kept.detach()[:floats]


@_scan.register_fake
def _(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial: Tensor | None,
    segments: Tensor | None,
    n_states: int,
    softplus: bool,
    reverse: bool,
    will_go_back: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x, A, segments, n_states, will_go_back)


@torch.library.custom_op("anymamba::selective_scan_backward", mutates_args=(), device_types="cpu")
def _scan_backward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial: Tensor | None,
    segments: Tensor | None,
    kept: Tensor,
    dy: Tensor,
    dlast: Tensor | None,
    n_states: int,
    softplus: bool,
    reverse: bool,
) -> list[Tensor]:
    """The gradients of x, delta, A, B, C, D, z, delta_bias, initial; empty where there is none."""
    gradients = _gradients(x, delta, A, B, C, D, z, delta_bias, initial)
    dx, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial = gradients
    inputs = [handed(t) for t in (x, delta, A, B, C, D, z, delta_bias)]
    core().scan_backward(
        *inputs,
        softplus,
        handed(initial),
        segments,
        n_states,
        reverse,
        _used(kept, x, A, segments, n_states),
        dy.detach(),
        None if dlast is None else dlast.detach().contiguous(),
        dx,
        ddelta,
        dA,
        dB,
        dC,
        None if D is None else dD,
        None if z is None else dz,
        None if delta_bias is None else ddelta_bias,
        None if initial is None else dinitial,
    )
    return gradients


def _gradients(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial: Tensor | None,
) -> list[Tensor]:
    def like(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        if tensor is None:
            return x.new_empty(0)
        dtype = dtype or tensor.dtype
        return torch.empty(tensor.shape, dtype=dtype, device=tensor.device)

    # B and C are summed over channels, in float32 whatever they are stored in.
    wide = torch.float32
    return [
        like(x),
        like(delta),
        like(A),
        like(B, wide),
        like(C, wide),
        like(D),
        like(z),
        like(delta_bias),
        like(initial),
    ]


@_scan_backward.register_fake
def _(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial: Tensor | None,
    segments: Tensor | None,
    kept: Tensor,
    dy: Tensor,
    dlast: Tensor | None,
    n_states: int,
    softplus: bool,
    reverse: bool,
) -> list[Tensor]:
    return _gradients(x, delta, A, B, C, D, z, delta_bias, initial)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, segments, n_states, softplus, reverse, _ = inputs
    ctx.save_for_backward(*tensors, segments, output[2])
    ctx.options = (n_states, softplus, reverse)
    ctx.set_materialize_grads(False)


def _go_back(ctx: Any, dy: Tensor | None, dlast: Tensor | None, _: Any) -> tuple[Any, ...]:
    *tensors, segments, kept = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(tensors[0])
    found = _scan_backward(*tensors, segments, kept, dy, dlast, *ctx.options)
    gradients = [
        None if tensor is None else gradient.to(tensor.dtype)
        for tensor, gradient in zip(tensors, found, strict=True)
    ]
    return (*gradients, None, None, None, None, None)


_scan.register_autograd(_go_back, setup_context=_keep)


def _again(*arguments: Any) -> tuple[Tensor, Tensor]:
    x, delta, A, B, C, D, z, delta_bias, initial = arguments[:9]
    segments, _, _, _, n_states, softplus, reverse = arguments[18:]
    table = segments_from_table(segments, n_states)
    inputs = (x, delta, A, B, C, D, z, delta_bias, softplus, initial, True, table, reverse)
    return scan_reference.selective_scan(*inputs)


register_second_derivatives(_scan_backward, 9, slice(11, 13), _again)


def _scan_step_now(
    state: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    softplus: bool,
) -> Tensor:
    y = torch.empty_like(x)
    inputs = [handed(t) for t in (x, delta, A, B, C, D, z, delta_bias)]
    core().scan_step(handed(state), *inputs, softplus, handed(y))
    torch.autograd.graph.increment_version(state)
    return y


_scan_step = torch.library.custom_op(
    "anymamba::selective_state_update",
    _scan_step_now,
    mutates_args=("state",),
    device_types="cpu",
)


@_scan_step.register_fake
def _(
    state: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    softplus: bool,
) -> Tensor:
    return torch.empty_like(x)
