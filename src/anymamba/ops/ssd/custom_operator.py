"""The state space duality in chunks, as PyTorch operators on any device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anymamba.ops.derivatives import register_second_derivatives
from anymamba.ops.native import segment_table
from anymamba.ops.segments import Segments, segments_from_table
from anymamba.ops.ssd.chunked import CHUNK_STEPS, Gradients, run_backward, run_forward
from anymamba.ops.ssd.reference import ssd_sequential
from anymamba.ops.tracing import is_transformed

__all__ = ["CHUNK_STEPS", "ssd_blocked"]


def ssd_blocked(
    x_blhp: Tensor,
    dt_blh: Tensor,
    A_h: Tensor,
    B_blgn: Tensor,
    C_blgn: Tensor,
    D_hp: Tensor | None,
    initial_states: Tensor | None,
    segments: Segments | None,
    chunk_steps: int = CHUNK_STEPS,
) -> tuple[Tensor, Tensor]:
    """y in the type of x, and the final states, (b, h, p, n) or one for each sequence.

    Args:
        x_blhp, A_h, B_blgn, C_blgn, initial_states: as in `anymamba.ops.ssd`.
        dt_blh: the step sizes themselves, after bias, softplus and limits.
        D_hp: (h, p) or (h, 1).
        segments: the packed sequences; None where each row is one.
        chunk_steps: q; the result does not depend on it.
    """
    wide = torch.promote_types(x_blhp.dtype, torch.float32)
    dt_blh, A_h = dt_blh.to(wide), A_h.to(wide)
    D_hp = None if D_hp is None else D_hp.to(wide)
    initial_states = None if initial_states is None else initial_states.to(wide)
    tensors = (x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_hp, initial_states)
    if is_transformed():
        return ssd_sequential(*tensors, segments)
    n_states = x_blhp.shape[0] if segments is None else segments.n_states
    y_blhp, last = _ssd(*tensors, segment_table(segments), n_states, chunk_steps)
    return y_blhp, last


@torch.library.custom_op("anymamba::ssd", mutates_args=())
def _ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    segments: Tensor | None,
    n_states: int,
    most_steps: int,
) -> tuple[Tensor, Tensor]:
    """One operator, so that compilers need not unroll the chunks of one length."""
    y, last = _outputs(x, dt, B, n_states)
    run_forward(x, dt, A, B, C, D, initial, segments, n_states, most_steps, y, last)
    return y, last


def _outputs(x: Tensor, dt: Tensor, B: Tensor, n_states: int) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape)
    return y, dt.new_empty(n_states, *x.shape[2:], B.shape[-1])


@_ssd.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    segments: Tensor | None,
    n_states: int,
    most_steps: int,
) -> tuple[Tensor, Tensor]:
    return _outputs(x, dt, B, n_states)


@torch.library.custom_op("anymamba::ssd_backward", mutates_args=())
def _ssd_backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    segments: Tensor | None,
    dy: Tensor,
    dlast: Tensor | None,
    n_states: int,
    most_steps: int,
) -> list[Tensor]:
    """The gradients of x, dt, A, B, C, D and the initial states; empty where there is none."""
    tensors = (x, dt, A, B, C, D, initial, segments)
    return run_backward(*tensors, dy, dlast, n_states, most_steps)


@_ssd_backward.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    segments: Tensor | None,
    dy: Tensor,
    dlast: Tensor | None,
    n_states: int,
    most_steps: int,
) -> list[Tensor]:
    return Gradients(x, dt, A, B, C, D, initial).in_order()


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.n_states, ctx.most_steps = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _go_back(ctx: Any, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, segments = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(tensors[0])
    found = _ssd_backward(*tensors, segments, dy, dlast, ctx.n_states, ctx.most_steps)
    pairs = zip(tensors, found, strict=True)
    gradients = (None if tensor is None else gradient for tensor, gradient in pairs)
    return (*gradients, None, None, None)


_ssd.register_autograd(_go_back, setup_context=_keep)


def _again(*arguments: Any) -> tuple[Tensor, Tensor]:
    x, dt, A, B, C, D, initial = arguments[:7]
    segments, _, _, n_states, _ = arguments[14:]
    table = segments_from_table(segments, n_states)
    return ssd_sequential(x, dt, A, B, C, D, initial, table)


register_second_derivatives(_ssd_backward, 7, slice(8, 10), _again)
