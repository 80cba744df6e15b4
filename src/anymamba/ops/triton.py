"""The Triton kernels as PyTorch sees them: where they run, what they take, how they are launched.

Imports no Triton, which takes a while and is needed by the kernels' own files alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The types of numbers that the kernels read."""
MOST_STATES = 256
"""The largest state size of the selective scan."""
_GPUS = ("cuda", "xpu")


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors too: TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def triton_devices() -> tuple[str, ...]:
    """The types of device that the kernels run on; AMD's GPUs are "cuda" to PyTorch as well."""
    return (*_GPUS, "cpu") if is_interpreted() else _GPUS


def is_available(device_type: str) -> bool:
    """Whether PyTorch can use a device of this type here.

    Example:
        >>> is_available("cpu")
        True
    """
    # Not `torch.get_device_module`, which `anymamba run` takes for a program's use of CUDA.
    return device_type == "cpu" or bool(getattr(torch, device_type).is_available())


def unsupported_reason(operator: str, arguments: Sequence[Any]) -> str | None:
    """Why the Triton kernels cannot serve a call, or None."""
    device = arguments[0].device
    for value in arguments:
        if not isinstance(value, Tensor):
            continue
        if value.device != device:
            return f"the tensors are on {device} and {value.device}"
        if value.is_complex() or (value.is_floating_point() and value.dtype not in TYPES):
            return f"its kernels do not offer {value.dtype}"
    if arguments[0].numel() == 0:
        return "its kernels refuse empty tensors"
    limits = _LIMITS.get(operator)
    return None if limits is None else limits(arguments)


def prefers_other(operator: str, arguments: Sequence[Any]) -> bool:
    """The interpreter, which is there to test, is never chosen by itself."""
    return arguments[0].device.type not in _GPUS


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make a tensor's device the one that kernels are launched on, among several GPUs."""
    if tensor.device.type == "cpu":
        return nullcontext()
    module = torch.get_device_module(tensor.device)
    device: AbstractContextManager[object] = module.device(tensor.device)
    return device


def tile_side(size: int, at_most: int) -> int:
    """The side of a tile for `size` elements: the next power of two, as Triton wants it.

    Example:
        >>> tile_side(5, at_most=64), tile_side(100, at_most=64)
        (8, 64)
    """
    return min(1 << max(size - 1, 0).bit_length(), at_most)


def _scan_limits(arguments: Sequence[Any]) -> str | None:
    states: int = arguments[2].shape[1]
    if not 1 <= states <= MOST_STATES:
        return f"its scan takes state sizes from 1 to {MOST_STATES}, not {states}"
    return None


_LIMITS = {"selective_scan": _scan_limits, "selective_state_update": _scan_limits}
