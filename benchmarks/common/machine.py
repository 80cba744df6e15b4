"""The machine that the numbers come from."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from common.roofline import core_or_none, peak_operations, read_bandwidth

__all__ = ["describe", "in_one_line"]

_PACKAGES = ("anymamba", "torch", "transformers", "mambapy", "llama-cpp-python")


def describe(quick: bool = False) -> dict[str, Any]:
    """Processor, memory, what AnyMamba runs on, and the versions of all that is compared."""
    core = core_or_none()
    bandwidth, how = read_bandwidth(1 << (20 if quick else 28))
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "caches": _caches(),
        "memory_gb": _memory_gb(),
        "read_gb_per_second": round(bandwidth / 1e9, 1),
        "read_by": how,
        "float_gflops": round(peak_operations() / 1e9),
        "byte_gops": round(peak_operations(bytes=True) / 1e9),
        "instructions": "no native core" if core is None else core.isa(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "load_at_start": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def in_one_line(machine: dict[str, Any]) -> str:
    """What a reader needs to place the numbers."""
    packages = [f"{name} {number}" for name, number in machine["versions"].items() if number]
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"caches {machine['caches']}, {machine['memory_gb']} GB of memory read at "
        f"{machine['read_gb_per_second']} GB/s ({machine['read_by']}), "
        f"AnyMamba on {machine['instructions']}; {', '.join(packages)}"
    )


def _processor() -> str:
    for line in _text("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _caches() -> str:
    found = []
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_text(folder / name) for name in ("level", "type", "size"))
        if kind != "Instruction":
            found.append(f"L{level} {size}")
    return ", ".join(found) or "unknown"


def _memory_gb() -> float | None:
    for line in _text("/proc/meminfo").splitlines():
        if line.startswith("MemTotal"):
            return round(int(line.split()[1]) * 1024 / 1e9, 1)
    return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:  # not Linux, or a container that hides it
        return ""
