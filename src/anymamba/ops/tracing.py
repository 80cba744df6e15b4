"""Is a call carried out now, or recorded, transformed or only imagined?

Kernels that are called past PyTorch's dispatcher save its time and stay unseen by whatever
watches operators: compilers, tracers, counters, function transforms. So they run only where
nothing watches.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

PLAIN_TYPES = (Tensor, torch.nn.Parameter)
"""Tensors that carry no behaviour of their own, as a subclass does."""


def runs_now(tensor: Tensor) -> bool:
    """Whether a call on this tensor is carried out at once and nothing but autograd watches.

    Example:
        >>> from torch.utils.flop_counter import FlopCounterMode
        >>> x = torch.ones(2)
        >>> with FlopCounterMode(display=False):
        ...     watched = runs_now(x)
        >>> runs_now(x), watched, runs_now(x.to("meta"))
        (True, False, False)
    """
    return not (
        torch.compiler.is_compiling()
        or type(tensor) not in PLAIN_TYPES
        or tensor.is_meta
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or is_transformed()
    )


def values_are_known(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor may decide what is computed.

    A counter of operators may be active; a tracer may not, for its graph would hold for these
    numbers only.
    """
    is_traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    if is_traced or is_transformed():
        return False
    modes = (torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE)
    if any(torch._C._get_dispatch_mode(mode) is not None for mode in modes):
        return False
    return type(tensor) in PLAIN_TYPES and not tensor.is_meta


def is_transformed() -> bool:
    """Whether `torch.func` transforms a call, or forward-mode derivatives are computed."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def autocast_is_on(device: torch.device) -> bool:
    """Whether autocast rewrites PyTorch's products on a device; never where it is unknown."""
    known = torch.amp.autocast_mode.is_autocast_available(device.type)
    return known and torch.is_autocast_enabled(device.type)


def in_chosen_types(device: torch.device) -> AbstractContextManager[object]:
    """Keep autocast away from products that are float32 on purpose."""
    if not autocast_is_on(device):
        return nullcontext()
    off: AbstractContextManager[object] = torch.autocast(device.type, enabled=False)
    return off


def copy_for_backward(state: Tensor | None) -> Tensor | None:
    """A state that an operator may keep for its backward pass while the forward overwrites it.

    Callers copy a state that they will overwrite. Inductor drops a `clone()` whose input it sees
    changed later, and the backward pass reads the new state; it cannot drop an operator of ours.
    """
    if state is None or not (torch.compiler.is_compiling() and torch.is_grad_enabled()):
        return state
    copied: Tensor = _copy(state)
    return copied


@torch.library.custom_op("anymamba::copy", mutates_args=())
def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone()


@_copy.register_fake
def _(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor)


def _go_back(ctx: Any, gradient: Tensor) -> Tensor:
    return gradient


_copy.register_autograd(_go_back)
