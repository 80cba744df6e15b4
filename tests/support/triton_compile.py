"""Compiles Triton's kernels for GPUs that are not here, as the operators launch them.

Run as a program, for Triton reads once a process whether to interpret: it takes the operators named
on the command line through `CASES` for one target, and prints a line of JSON for each launch: its
kernel, whether that is new or was compiled for an earlier launch, and the registers, spilled bytes
and shared memory that NVIDIA's assembler reports.

    TRITON_INTERPRET=0 python -m tests.support.triton_compile cuda:90 selective_scan ssd
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from anymamba import ops
from anymamba.ops import backends
from anymamba.ops import triton as triton_module
from tests.support.triton_cases import CASES


class NoDevice:
    """What Triton asks of a driver while it compiles, for a GPU that is not here."""

    def __init__(self, target: Any) -> None:
        self._target = target
        self.utils = SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": 1 << 17})

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(name: str, call: Callable[[], Any]) -> Iterator[tuple[str, Any, float]]:
    """The kernels that an operator launches, compiled instead: name, kernel, seconds."""
    from triton.runtime.jit import JITFunction

    kernels: list[tuple[str, Any, float]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        start = time.perf_counter()
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        kernels.append((f"{name}: {self.fn.__name__}", kernel, time.perf_counter() - start))
        return kernel

    JITFunction.run = compile_only
    try:
        call()
    finally:
        JITFunction.run = run
    yield from kernels


def resources(cubin: bytes) -> dict[str, int]:
    """What a compiled kernel takes of an NVIDIA GPU: REG, STACK (spilled, in bytes), SHARED."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED):(\d+)", text)}


def main(target: str, names: list[str]) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    kind, _, architecture = target.partition(":")
    number = int(architecture) if architecture.isdecimal() else architecture
    triton.runtime.driver.set_active(NoDevice(GPUTarget(kind, number, 64 if kind == "hip" else 32)))
    # The tensors are on the CPU; their numbers do not matter, for nothing is launched. With a GPU's
    # number of processors, the sizes are cut as there.
    triton_module._processors = lambda _: 132
    entry = backends.BACKENDS["triton"]
    object.__setattr__(entry, "devices", (*entry.devices, "cpu"))
    seen: dict[int, Any] = {}
    for name, case in CASES.items():
        if names and not name.startswith(tuple(names)):
            continue
        with ops.backend("triton"):
            for label, kernel, seconds in compiled(name, case):
                found: dict[str, Any] = {"kernel": label, "seconds": round(seconds, 3)}
                found["new"] = id(kernel) not in seen
                seen[id(kernel)] = kernel
                found["warps"] = kernel.metadata.num_warps
                if "cubin" in kernel.asm:
                    found |= resources(kernel.asm["cubin"])
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    main(sys.argv[1], sys.argv[2:])
