"""What processes hand to one another when each holds a chunk of the sequence.

A scan is linear in the state it starts from: the state after a chunk is `decay * before + last`,
where `last` is what the chunk leaves when it starts from zeros, and `decay` what remains of
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


def check_started(who: str) -> None:
    """Refuse to work without a process group.

    Args:
        who: the function that needs it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise InputError(
            f"{who}: there is no process group; start the program with torchrun and call "
            'torch.distributed.init_process_group("gloo") first ("nccl" on GPUs)'
        )


def state_before(decay_ben: Tensor, last_ben: Tensor, group: Any = None) -> tuple[Tensor, Tensor]:
    """The state in which this process's chunk of the sequence begins. Has no gradient.

    Args:
        decay_ben: (b, e, n), or (b, h, p, n) with heads as all states here: what remains after this
            chunk of a state before it, in float32.
        last_ben: (b, e, n), the state after this chunk if it begins with zeros.
        group: the processes, in the order of their chunks; all of them if None.

    Returns:
        (b, e, n), zeros on the first process; and (p, b, e, n), the decays of all processes, which
        `gradient_after` needs.
    """
    both_p2ben = _gathered(torch.stack([decay_ben, last_ben]), group)
    before_ben = torch.zeros_like(last_ben)
    for decay, last in both_p2ben[: dist.get_rank(group)]:
        before_ben = decay * before_ben + last
    return before_ben, torch.stack([decay for decay, _ in both_p2ben])


def gradient_after(decay_pben: Tensor, dbefore_ben: Tensor, group: Any = None) -> Tensor:
    """The gradient of the state after this process's chunk, from all that comes later.

    Args:
        decay_pben: the decays of all processes, from `state_before`.
        dbefore_ben: (b, e, n), the gradient of the state before this chunk, from this chunk.
        group: as in `state_before`.

    Returns:
        (b, e, n), zeros on the last process.
    """
    dbefore_p = _gathered(dbefore_ben, group)
    dafter_ben = torch.zeros_like(dbefore_ben)
    for rank in range(len(dbefore_p) - 1, dist.get_rank(group), -1):
        dafter_ben = dbefore_p[rank] + decay_pben[rank] * dafter_ben
    return dafter_ben


def window_before(tail_bwe: Tensor, group: Any = None) -> Tensor:
    """The inputs that stand before this process's chunk, whose last w are given. Differentiable.

    Returns:
        (b, w, e), the previous process's tail; zeros on the first.
    """
    before: Tensor = _WindowBefore.apply(tail_bwe, group)
    return before


def sum_of_losses(loss: Tensor, group: Any = None) -> Tensor:
    """The sum over all processes; each sends back to its own part alone."""
    total: Tensor = _Sum.apply(loss, group)
    return total


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
