"""The most memory that this process has held, as each system tells it."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path


def peak_memory() -> int | None:
    """The most memory that this process has held, in bytes; None where the system cannot say.

    Example:
        >>> peak_memory() > 1_000_000
        True
    """
    try:
        # Linux counts what the process had before it became this program into `ru_maxrss`.
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        (most,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
        return int(most) * 1024
    except (OSError, ValueError):
        return _most_resident()


def _most_resident() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return _peak_working_set()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts in bytes, others in kilobytes.
    return most if sys.platform == "darwin" else most * 1024


class MemoryCounters(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS of Windows."""

    _fields_ = (
        ("cb", ctypes.c_uint32),
        ("PageFaultCount", ctypes.c_uint32),
        ("PeakWorkingSetSize", ctypes.c_size_t),
        ("WorkingSetSize", ctypes.c_size_t),
        ("QuotaPeakPagedPoolUsage", ctypes.c_size_t),
        ("QuotaPagedPoolUsage", ctypes.c_size_t),
        ("QuotaPeakNonPagedPoolUsage", ctypes.c_size_t),
        ("QuotaNonPagedPoolUsage", ctypes.c_size_t),
        ("PagefileUsage", ctypes.c_size_t),
        ("PeakPagefileUsage", ctypes.c_size_t),
    )


def _peak_working_set() -> int | None:
    load = getattr(ctypes, "WinDLL", None)
    if load is None:
        return None
    kernel = load("kernel32")
    # A handle has the size of a pointer; the default, an int, would cut it.
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    ask = kernel.K32GetProcessMemoryInfo
    ask.argtypes = (ctypes.c_void_p, ctypes.POINTER(MemoryCounters), ctypes.c_uint32)
    counters = MemoryCounters(cb=ctypes.sizeof(MemoryCounters))
    if not ask(kernel.GetCurrentProcess(), ctypes.byref(counters), counters.cb):
        return None
    return int(counters.PeakWorkingSetSize)
