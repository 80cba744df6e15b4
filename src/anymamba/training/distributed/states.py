"""What processes hand to one another when each holds a stretch of the sequence.

A scan is linear in the state it starts from: the state after a stretch is `decay * before + last`,
where `last` is what the stretch leaves when it starts from zeros, and `decay` what remains of
anything older. So every process can work at once and two small tensors tell the rest. The
gradients go back by the same rule, with the last process first.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from anymamba.errors import InputError

__all__ = ["check_started", "state_before", "sum_of_losses", "window_before"]


def check_started(who: str) -> None:
    """Refuse to work without a process group.

    Args:
        who: the function that needs it.

    Raises:
        InputError: `torch.distributed` was not started.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise InputError(
            f"{who}: there is no process group; start the program with torchrun and call "
            'torch.distributed.init_process_group("gloo") first ("nccl" on GPUs)'
        )


def state_before(decay_ben: Tensor, last_ben: Tensor, group: Any = None) -> Tensor:
    """The state in which this process's stretch of the sequence begins. Differentiable.

    Args:
        decay_ben: (b, e, n), what remains after this stretch of a state before it, in float32.
        last_ben: (b, e, n), the state after this stretch if it begins with zeros.
        group: the processes, in the order of their stretches; all of them if None.

    Returns:
        (b, e, n), zeros on the first process.
    """
    before: Tensor = _StateBefore.apply(decay_ben, last_ben, group)
    return before


def window_before(tail_bwe: Tensor, group: Any = None) -> Tensor:
    """The inputs that stand before this process's stretch. Differentiable.

    Args:
        tail_bwe: (b, w, e), the last w inputs of this stretch.
        group: the processes, in the order of their stretches; all of them if None.

    Returns:
        (b, w, e), the previous process's tail; zeros on the first.
    """
    before: Tensor = _WindowBefore.apply(tail_bwe, group)
    return before


def sum_of_losses(loss: Tensor, group: Any = None) -> Tensor:
    """The sum over all processes; each sends back to its own part alone.

    Args:
        loss: a number, this process's part.
        group: the processes; all of them if None.
    """
    total: Tensor = _Sum.apply(loss, group)
    return total


class _StateBefore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, decay_ben: Tensor, last_ben: Tensor, group: Any) -> Tensor:
        rank = dist.get_rank(group)
        both_p2ben = _gathered(torch.stack([decay_ben, last_ben]), group)
        before = torch.zeros_like(last_ben)
        for decay, last in both_p2ben[:rank]:
            before = decay * before + last
        ctx.save_for_backward(torch.stack([decay for decay, _ in both_p2ben]), before)
        ctx.group = group
        return before

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dbefore: Tensor) -> tuple[Tensor, Tensor, None]:
        decay_pben, before = ctx.saved_tensors
        later = range(dist.get_rank(ctx.group) + 1, decay_pben.shape[0])
        dbefore_p = _gathered(dbefore, ctx.group)
        dafter = torch.zeros_like(dbefore)
        for rank in reversed(later):
            dafter = dbefore_p[rank] + decay_pben[rank] * dafter
        return dafter * before, dafter, None


class _WindowBefore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tail_bwe: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _handed_on(tail_bwe, +1, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dbefore: Tensor) -> tuple[Tensor, None]:
        return _handed_on(dbefore, -1, ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        total = part.detach().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor, None]:
        return dtotal, None


def _gathered(tensor: Tensor, group: Any) -> list[Tensor]:
    """Every process's tensor, in order."""
    tensor = tensor.contiguous()
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, tensor, group=group)
    return found


def _handed_on(tensor: Tensor, step: int, group: Any) -> Tensor:
    """What the neighbour on one side holds, while ours goes to the other; zeros at the end."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    tensor = tensor.contiguous()
    received = torch.zeros_like(tensor)
    exchange = []
    if 0 <= rank + step < size:
        exchange.append(dist.P2POp(dist.isend, tensor, group=group, group_peer=rank + step))
    if 0 <= rank - step < size:
        exchange.append(dist.P2POp(dist.irecv, received, group=group, group_peer=rank - step))
    for request in dist.batch_isend_irecv(exchange) if exchange else []:
        request.wait()
    return received
