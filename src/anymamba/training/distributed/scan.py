"""The selective scan, and Mamba-2's, over a sequence of which every process holds a chunk.

Each process scans its chunk from zeros first, to tell the others what it leaves, and then from
the state that follows from what they told. Backward it is the same: the gradient of the state
before the chunk is found first, and told; then come the gradients of everything else, with that
of the state after the chunk. A process could wait for the one before instead and scan once, but
then only one would work at a time. Source of the rule: "Mamba: Linear-Time Sequence Modeling with
Selective State Spaces" (arXiv 2312.00752), section 3.3.2 (the scan is associative), here with
processes for steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from anymamba import ops
from anymamba.training.distributed.states import gradient_after, state_before


def parallel_scan(
    x_ble: Tensor,
    delta_ble: Tensor,
    A_en: Tensor,
    B_bln: Tensor,
    C_bln: Tensor,
    D_e: Tensor,
    z_ble: Tensor,
    delta_bias_e: Tensor | None,
    *,
    group: Any = None,
    fallback: str = "reference",
) -> Tensor:
    """`anymamba.ops.selective_scan` with softplus, on one chunk of the sequence.

    Args:
        x_ble, delta_ble, A_en, B_bln, C_bln, D_e, z_ble, delta_bias_e: as there, for this chunk.
        group: the processes, in the order of their chunks; all of them if None.
        fallback: as there.

    Returns:
        y_ble, what a scan of the whole sequence gives for this chunk.
    """

    def scan(inputs: Any, before_ben: Tensor | None) -> Any:
        options: Any = {"return_last_state": True, "fallback": fallback}
        return ops.selective_scan(*(*inputs, True), initial_state=before_ben, **options)

    def decay(delta_ble: Tensor, A_en: Tensor, bias_e: Tensor | None) -> Tensor:
        return torch.exp(_steps(delta_ble, bias_e).sum(1)[..., None] * A_en)

    inputs = (x_ble, delta_ble, A_en, B_bln, C_bln, D_e, z_ble, delta_bias_e)
    y_ble: Tensor = _ParallelScan.apply(_Recurrence(scan, decay), group, *inputs)
    return y_ble


def parallel_ssd(
    inputs: tuple[Tensor | None, ...], dt_limit: tuple[float, float], group: Any = None
) -> Tensor:
    """`anymamba.ops.ssd` with softplus, on one chunk of the sequence.

    Args:
        inputs: x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h, z_blhp and dt_bias_h as there, for this
            chunk.
        dt_limit: the least and the largest step size.
        group: the processes, in the order of their chunks; all of them if None.

    Returns:
        y_blhp, what the whole sequence gives for this chunk.
    """

    def scan(given: Any, before_bhpn: Tensor | None) -> Any:
        options: Any = {"return_last_state": True, "dt_limit": dt_limit}
        return ops.ssd(*(*given, True), initial_state=before_bhpn, **options)

    def decay(dt_blh: Tensor, A_h: Tensor, bias_h: Tensor | None) -> Tensor:
        return torch.exp(_steps(dt_blh, bias_h).clamp(*dt_limit).sum(1) * A_h)[..., None, None]

    y_blhp: Tensor = _ParallelScan.apply(_Recurrence(scan, decay), group, *inputs)
    return y_blhp


class _Recurrence(NamedTuple):
    """What tells one scan from another.

    Args:
        scan: of the inputs and the state before them, which may be None: y and the last state.
        decay: of the steps, A and the steps' bias: what remains of a state after the chunk. It has
            the state's axes, of which some may be one.
    """

    scan: Callable[[Any, Tensor | None], tuple[Tensor, Tensor]]
    decay: Callable[[Tensor, Tensor, Tensor | None], Tensor]


class _ParallelScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recurrence: _Recurrence, group: Any, *inputs: Any) -> Tensor:
        x, delta, A, B, C, _, _, delta_bias = inputs
        _, last = recurrence.scan((x, delta, A, B, C, None, None, delta_bias), None)
        decay = recurrence.decay(delta, A, delta_bias).expand_as(last)
        before, decay_p = state_before(decay, last, group)
        y, _ = recurrence.scan(inputs, before)
        ctx.save_for_backward(*inputs, before, decay_p)
        ctx.recurrence, ctx.group = recurrence, group
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, before, decay_p = ctx.saved_tensors
        with torch.enable_grad():
            # Once more, because only now it is known that this will go back.
            before = before.detach().requires_grad_()
            leaves = [
                None if tensor is None else tensor.detach().requires_grad_(needed)
                for tensor, needed in zip(inputs, ctx.needs_input_grad[2:], strict=True)
            ]
            y, last = ctx.recurrence.scan(leaves, before)
        (dbefore,) = torch.autograd.grad(y, before, dy, retain_graph=True)
        dafter = gradient_after(decay_p, dbefore, ctx.group)
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        found = iter(torch.autograd.grad((y, last), wanted, (dy, dafter)))
        gradients = [next(found) if needed else None for needed in ctx.needs_input_grad[2:]]
        return None, None, *gradients


def _steps(delta: Tensor, bias: Tensor | None) -> Tensor:
    """(b, l, .), how long each step lasts, in float32."""
    steps = delta.float() if bias is None else delta.float() + bias.float()
    return F.softplus(steps)
