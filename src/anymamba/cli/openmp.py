"""How threads wait for work while PyTorch's and the native core's take turns."""

from __future__ import annotations

import os


def let_waiting_threads_sleep() -> None:
    """Let PyTorch's OpenMP threads sleep as soon as they have nothing to do.

    By default they go on spinning for milliseconds, and take a processor from the native core's
    threads, which work between PyTorch's own operators. To be called before PyTorch is imported,
    for OpenMP reads the variable then; one that the user has set stays.

    Example:
        >>> let_waiting_threads_sleep()
        >>> "OMP_WAIT_POLICY" in os.environ
        True
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
