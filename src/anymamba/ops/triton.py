"""The Triton kernels as PyTorch sees them: where they run, what they take, how they are launched.

Imports no Triton, which takes a while and is needed by the kernels' own files alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The types of numbers that the kernels read."""
MOST_STATES = 256
"""The largest state size of the selective scan."""
PROGRAMS_PER_PROCESSOR = 8
"""With fewer programs of one warp, a GPU's processors wait for memory."""
MOST_CHANNELS_OF_A_ROW = 1 << 14
"""The longest rows of a norm, which a program holds whole."""
MOST_TAPS = 16
"""The widest kernel of the convolution, whose taps are written out one by one."""
OLDEST = (3, 4)
"""The oldest Triton for which all kernels were compiled."""
_DISTRIBUTIONS = ("triton", "pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu")
OLDEST_FOR_SSD = (8, 0)
"""NVIDIA's first GPUs (A100) that multiply bfloat16, with the shared memory that `ssd` takes."""
_GPUS = ("cuda", "xpu")


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors too: TRITON_INTERPRET=1.

    Other words for yes count where the installed Triton takes them.
    """
    return os.environ.get("TRITON_INTERPRET", "").lower() in _YES


def _words_for_yes() -> tuple[str, ...]:
    """Triton that has no `knobs` yet, before 3.4, knows "1" alone."""
    spec = find_spec("triton")
    folders = () if spec is None else spec.submodule_search_locations or ()
    has_knobs = any((Path(folder) / "knobs.py").exists() for folder in folders)
    return ("1", "true", "on", "yes", "y") if has_knobs else ("1",)


_YES = _words_for_yes()


def triton_devices() -> tuple[str, ...]:
    """The types of device that the kernels run on; AMD's GPUs are "cuda" to PyTorch as well."""
    return (*_GPUS, "cpu") if is_interpreted() else _GPUS


def why_too_old() -> str | None:
    """Why the Triton that is installed cannot compile the kernels, or None."""
    for name in _DISTRIBUTIONS:
        try:
            text = version(name)
        except PackageNotFoundError:
            continue
        found = tuple(int(part) for part in re.findall(r"\d+", text)[:2])
        if found < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            return f"{name} {text} is too old, {oldest} or newer is needed: PyTorch 2.8 brings it"
        return None
    return None


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
    if arguments[0].numel() == 0 and operator not in _TAKE_EMPTY:
        return "its kernels refuse empty tensors"
    limits = _LIMITS.get(operator)
    return None if limits is None else limits(arguments)


def prefers_other(operator: str, arguments: Sequence[Any]) -> bool:
    """The interpreter, which is there to test, is never chosen by itself."""
    return arguments[0].device.type not in _GPUS


def description() -> str:
    """How the kernels would run here."""
    if is_interpreted():
        return "interpreted (TRITON_INTERPRET), which is slow, for tests that ask for it by name"
    return "compiled for the GPU at first use; not run on hardware yet"


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make a tensor's device the one that kernels are launched on, among several GPUs."""
    if tensor.device.type == "cpu":
        return nullcontext()
    module = torch.get_device_module(tensor.device)
    device: AbstractContextManager[object] = module.device(tensor.device)
    return device


def tile_side(size: int, at_most: float) -> int:
    """The side of a tile for `size` elements: the next power of two, as Triton wants it.

    Example:
        >>> tile_side(5, at_most=64), tile_side(100, at_most=64)
        (8, 64)
    """
    return int(min(1 << max(size - 1, 0).bit_length(), at_most))


def strides(tensor: Tensor | None, axes: int) -> tuple[int, ...]:
    """The strides of a tensor that may be absent."""
    return (0,) * axes if tensor is None else tensor.stride()


def wanted_programs(device: torch.device) -> int:
    """How many programs of one warp keep all of a GPU's processors busy."""
    return PROGRAMS_PER_PROCESSOR * _processors(device)


def launch_options(warps: int, registers: int | None = None) -> dict[str, Any]:
    """What a kernel is compiled with.

    Products and sums become single instructions, which Triton 3.10 does only where it is asked to.

    Args:
        warps: of a program.
        registers: the most that a thread may have, so that more programs run at once. Only
            NVIDIA's compiler can be told.
    """
    options: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": True}
    if registers is not None and not is_interpreted():
        from triton.runtime import driver

        if driver.active.get_current_target().backend == "cuda":
            options["maxnreg"] = registers
    return options


@cache
def _processors(device: torch.device) -> int:
    """How many multiprocessors a GPU has; the interpreter runs one program at a time."""
    if device.type == "cpu":
        return 1
    properties = torch.get_device_module(device).get_device_properties(device)
    for name in ("multi_processor_count", "gpu_subslice_count", "max_compute_units"):
        if hasattr(properties, name):
            return int(getattr(properties, name))
    return 1


def warps_for(tile: int) -> int:
    """How many warps share a tile of so many numbers: 16 for a thread, where there are enough.

    Example:
        >>> warps_for(64), warps_for(2048), warps_for(65536)
        (1, 4, 16)
    """
    return min(max(tile // 512, 1), 16)


def _scan_limits(arguments: Sequence[Any]) -> str | None:
    states: int = arguments[2].shape[1]
    if not 1 <= states <= MOST_STATES:
        return f"its scan takes state sizes from 1 to {MOST_STATES}, not {states}"
    return None


def _conv_limits(arguments: Sequence[Any]) -> str | None:
    taps: int = arguments[1].shape[1]
    if taps > MOST_TAPS:
        return f"its convolution takes kernels of up to {MOST_TAPS} taps, not {taps}"
    return None


def _norm_limits(arguments: Sequence[Any]) -> str | None:
    channels: int = arguments[0].shape[-1]
    if channels > MOST_CHANNELS_OF_A_ROW:
        return f"its norm takes rows of up to {MOST_CHANNELS_OF_A_ROW} channels, not {channels}"
    return None


def _heads_limits(arguments: Sequence[Any]) -> str | None:
    return None if arguments[3].shape[-1] else "its kernels need a state"


def _ssd_limits(arguments: Sequence[Any]) -> str | None:
    device = arguments[0].device
    capability = _capability(device) if device.type == "cuda" else None
    if capability is not None and capability < OLDEST_FOR_SSD:
        oldest, found = (".".join(map(str, pair)) for pair in (OLDEST_FOR_SSD, capability))
        return f"its ssd takes GPUs of compute capability {oldest} or more, not {found}"
    return _heads_limits(arguments)


# A compiler takes the answer as it is, and does not look into PyTorch's way to it.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _capability(device: torch.device) -> tuple[int, int] | None:
    """NVIDIA's number for what a GPU can do; None for AMD's GPUs."""
    if torch.version.hip is not None:
        return None
    if device not in _capabilities:
        _capabilities[device] = torch.cuda.get_device_capability(device)
    return _capabilities[device]


_capabilities: dict[torch.device, tuple[int, int]] = {}


_TAKE_EMPTY = (
    *("selective_scan", "selective_state_update"),
    *("causal_conv1d", "causal_conv1d_update", "rms_norm"),
)
_LIMITS = {
    "causal_conv1d": _conv_limits,
    "rms_norm": _norm_limits,
    "selective_scan": _scan_limits,
    "selective_state_update": _scan_limits,
    "ssd": _ssd_limits,
    "ssd_state_update": _heads_limits,
}
