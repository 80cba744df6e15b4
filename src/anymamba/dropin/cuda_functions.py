"""What `torch.cuda` answers on machines without it, to programs that ask on their way.

`torch.cuda.is_available()` stays false and `device_count()` zero: programs that look take their own
way on a CPU. What fails without CUDA, and is asked by programs that do not look, is answered here
as by a device with the processor's memory, whose work is always done.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch

Replacements = list[tuple[Any, str, Any]]
"""Owner, name and value of attributes."""

_DONE_ALREADY = (
    *("init", "ipc_collect", "set_device", "set_stream", "synchronize"),
    *("set_rng_state", "set_rng_state_all", "set_per_process_memory_fraction"),
    *("reset_accumulated_memory_stats", "reset_max_memory_allocated", "reset_max_memory_cached"),
    "reset_peak_memory_stats",
)
"""Functions of `torch.cuda` that have nothing to do, and return nothing."""

_TYPES = ("BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short")


def replacements() -> Replacements:
    """What stands in for attributes of PyTorch that only work with CUDA."""
    # Each is an object of its own: PyTorch's compiler looks functions up by their identity.
    functions: dict[str, Any] = {name: _nothing() for name in _DONE_ALREADY}
    functions |= {
        "Event": Event,
        "Stream": Stream,
        "current_device": lambda: 0,
        "current_stream": lambda device=None: Stream(),
        "default_stream": lambda device=None: Stream(),
        "device": _no_context(),
        "device_of": _no_context(),
        "get_device_capability": lambda device=None: (0, 0),
        "get_device_name": lambda device=None: _name(),
        "get_device_properties": lambda device=None: _properties(),
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "is_bf16_supported": lambda including_emulation=True: True,
        "mem_get_info": lambda device=None: _memory(),
        "memory_summary": lambda device=None, abbreviated=False: "",
        "stream": _no_context(),
        "utilization": lambda device=None: 0,
    }
    functions |= {f"{kind}Tensor": getattr(torch, f"{kind}Tensor") for kind in _TYPES}
    return [
        *((torch.cuda, name, value) for name, value in functions.items()),
        *((torch.cuda.nvtx, name, _nothing()) for name in ("mark", "range_pop", "range_push")),
        (torch.cuda.nvtx, "range", _no_context()),
        *((torch.cuda.profiler, name, _nothing()) for name in ("start", "stop")),
        (torch, "Generator", _generator_on_the_cpu()),
        (torch.Tensor, "record_stream", _nothing()),
        (torch.UntypedStorage, "cuda", lambda storage, *args, **kwargs: storage),
        (torch.TypedStorage, "cuda", lambda storage, *args, **kwargs: storage),
    ]


def _nothing() -> Callable[..., None]:
    """A function that does nothing."""
    return lambda *args, **kwargs: None


def _no_context() -> type:
    """A class of contexts that change nothing, whatever they are given."""

    class NoContext(nullcontext[None]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__()

    return NoContext


class Event:
    """A moment, whose work is done when it is recorded. Stands for `torch.cuda.Event`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seconds = 0.0

    def record(self, stream: Any = None) -> None:
        """Take the time."""
        self._seconds = time.perf_counter()

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds until another event."""
        return 1e3 * (end_event._seconds - self._seconds)

    def query(self) -> bool:
        """Whether it has come: always."""
        return True

    # There is nothing to wait for.
    synchronize = wait = _nothing()


class Stream:
    """Work in its order, all of it done. Stands for `torch.cuda.Stream`; is a context as well."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device, self.cuda_stream, self.stream_id, self.priority = torch.device("cpu"), 0, 0, 0

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *caught: Any) -> None:
        return None

    def query(self) -> bool:
        """Whether all is done: always."""
        return True

    def record_event(self, event: Event | None = None) -> Event:
        """Record an event, a new one by default."""
        event = event or Event()
        event.record()
        return event

    # There is nothing to wait for.
    synchronize = wait_event = wait_stream = _nothing()


def _name() -> str:
    return f"CPU in place of CUDA ({platform.processor() or platform.machine()})"


def _memory() -> tuple[int, int]:
    """Free and total bytes of the machine; zero where the system does not tell."""
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        return page * os.sysconf("SC_AVPHYS_PAGES"), page * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0, 0


def _properties() -> SimpleNamespace:
    return SimpleNamespace(
        name=_name(),
        major=0,
        minor=0,
        total_memory=_memory()[1],
        multi_processor_count=os.cpu_count() or 1,
        is_integrated=True,
        is_multi_gpu_board=False,
    )


def _generator_on_the_cpu() -> type:
    """`torch.Generator` whose device is always the CPU; generators of PyTorch are instances."""
    original = torch.Generator

    class AnyGenerator(type):
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, original)

        def __call__(cls, device: Any = None) -> torch.Generator:
            return original()

    return AnyGenerator("Generator", (), {"__doc__": original.__doc__})
