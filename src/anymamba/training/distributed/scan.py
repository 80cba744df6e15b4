"""The selective scan over a sequence of which every process holds a chunk.

Each process scans its chunk from zeros first, to tell the others what it leaves, and then from
the state that follows from what they told. Backward it is the same: the gradient of the state
before the chunk is found first, and told; then come the gradients of everything else, with that
of the state after the chunk. A process could wait for the one before instead and scan once, but
then only one would work at a time. Source of the rule: "Mamba: Linear-Time Sequence Modeling with
Selective State Spaces" (arXiv 2312.00752), section 3.3.2 (the scan is associative), here with
processes for steps.
"""

from __future__ import annotations

from typing import Any

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
    inputs = (x_ble, delta_ble, A_en, B_bln, C_bln, D_e, z_ble, delta_bias_e)
    y_ble: Tensor = _ParallelScan.apply(group, fallback, *inputs)
    return y_ble


class _ParallelScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Any, fallback: str, *inputs: Any) -> Tensor:
        x, delta, A, B, C, _, _, delta_bias = inputs
        _, last_ben = _scan((x, delta, A, B, C, None, None, delta_bias), None, fallback)
        decay_ben = torch.exp(_time(delta, delta_bias)[..., None] * A)
        before_ben, decay_pben = state_before(decay_ben, last_ben, group)
        y_ble, _ = _scan(inputs, before_ben, fallback)
        ctx.save_for_backward(*inputs, before_ben, decay_pben)
        ctx.group, ctx.fallback = group, fallback
        return y_ble

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ble: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, before_ben, decay_pben = ctx.saved_tensors
        with torch.enable_grad():
            # Once more, because only now it is known that this will go back.
            before_ben = before_ben.detach().requires_grad_()
            leaves = [
                None if tensor is None else tensor.detach().requires_grad_(needed)
                for tensor, needed in zip(inputs, ctx.needs_input_grad[2:], strict=True)
            ]
            y_ble, last_ben = _scan(leaves, before_ben, ctx.fallback)
        (dbefore_ben,) = torch.autograd.grad(y_ble, before_ben, dy_ble, retain_graph=True)
        dafter_ben = gradient_after(decay_pben, dbefore_ben, ctx.group)
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        found = iter(torch.autograd.grad((y_ble, last_ben), wanted, (dy_ble, dafter_ben)))
        gradients = [next(found) if needed else None for needed in ctx.needs_input_grad[2:]]
        return None, None, *gradients


def _scan(inputs: Any, before_ben: Tensor | None, fallback: str) -> tuple[Tensor, Tensor]:
    """y and the last state. The inputs are those of `parallel_scan`, in its order."""
    both = ops.selective_scan(
        *(*inputs, True), initial_state=before_ben, return_last_state=True, fallback=fallback
    )
    assert isinstance(both, tuple)
    return both


def _time(delta_ble: Any, delta_bias_e: Tensor | None) -> Tensor:
    """(b, e), the sum of a chunk's steps, in float32."""
    step_ble: Tensor = delta_ble.float()
    if delta_bias_e is not None:
        step_ble = step_ble + delta_bias_e.float()
    return F.softplus(step_ble).sum(1)
