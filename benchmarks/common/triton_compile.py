"""Triton's kernels compiled for GPUs that are not here."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from anymamba import ops
from anymamba.ops import backends
from anymamba.ops import triton as kernels

__all__ = ["Launch", "compiled_only", "disassembled", "resources"]

# As many as an H100 has, so that work is cut up as there.
PROCESSORS = 132
_indices = count()


class Launch(NamedTuple):
    """A kernel that would have been launched: its name, what was compiled, and how long that took.

    `is_new` is false where an earlier launch had it compiled.
    """

    name: str
    kernel: Any
    seconds: float
    is_new: bool
    arguments: dict[str, Any]


class NoDevice:
    """What Triton asks of a driver while it compiles.

    Args:
        target: the GPU that is not here.
    """

    def __init__(self, target: GPUTarget) -> None:
        self._target, self._index = target, next(_indices)
        self.utils = SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": 1 << 17})

    def get_current_target(self) -> GPUTarget:
        """The GPU."""
        return self._target

    def get_current_device(self) -> int:
        """One of its own: what was compiled for another GPU is kept with that one's number."""
        return self._index

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return device


@contextmanager
def compiled_only(target: str) -> Iterator[Callable[[Callable[[], object]], list[Launch]]]:
    """Compile the kernels that calls of operators launch, and launch none.

    The process must not interpret Triton (TRITON_INTERPRET=0). The calls' tensors are on the CPU,
    and the numbers that they return mean nothing.

    Args:
        target: "cuda:90", "hip:gfx942".

    Returns:
        A context with a function that makes a call and returns its launches.
    """
    kind, _, architecture = target.partition(":")
    number = int(architecture) if architecture.isdecimal() else architecture
    entry, run, processors = backends.BACKENDS["triton"], JITFunction.run, kernels._processors
    devices = entry.devices
    triton.runtime.driver.set_active(NoDevice(GPUTarget(kind, number, 64 if kind == "hip" else 32)))
    launches: list[Launch] = []
    seen: dict[int, Any] = {}

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        start = time.perf_counter()
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        took = time.perf_counter() - start
        launches.append(Launch(self.fn.__name__, kernel, took, id(kernel) not in seen, kwargs))
        seen[id(kernel)] = kernel
        return kernel

    def launches_of(call: Callable[[], object]) -> list[Launch]:
        launches.clear()
        with ops.backend("triton"):
            call()
        return list(launches)

    JITFunction.run = compile_only
    kernels._processors = lambda _: PROCESSORS
    object.__setattr__(entry, "devices", (*devices, "cpu"))
    try:
        yield launches_of
    finally:
        JITFunction.run, kernels._processors = run, processors
        object.__setattr__(entry, "devices", devices)


def resources(cubin: bytes) -> dict[str, int]:
    """What a kernel takes of an NVIDIA GPU: REG, STACK (spilled, in bytes a thread), SHARED."""
    text = _cuobjdump("--dump-resource-usage", cubin)
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED):(\d+)", text)}


def disassembled(cubin: bytes) -> list[tuple[int, str]]:
    """A kernel's instructions for an NVIDIA GPU: their addresses and texts."""
    found = re.finditer(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", _cuobjdump("-sass", cubin))
    return [(int(match[1], 16), match[2]) for match in found]


def _cuobjdump(option: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [tool, option, file.name], capture_output=True, text=True, check=True
        ).stdout
