"""How much memory a process holds, and how much it held at most."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

__all__ = ["peak_above"]

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak_above(warm_up: Callable[[], object], run: Callable[[], object]) -> int:
    """The bytes that `run` needs at most, above those in use before it.

    Args:
        warm_up: something small that loads code and starts threads; what that takes is not
            counted.
        run: what is measured.

    Raises:
        OSError: the system has no /proc that tells.
    """
    warm_up()
    gc.collect()
    # Linux keeps the highest number of a process's life; 5 makes it start again from now. The
    # number that getrusage gives cannot be used: it includes that of the parent.
    _CLEAR.write_text("5", encoding="utf-8")
    before = _bytes("VmRSS")
    run()
    return _bytes("VmHWM") - before


def _bytes(field: str) -> int:
    for line in _STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} does not tell {field}")
