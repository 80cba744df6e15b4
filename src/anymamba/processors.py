"""How many processors this process may use: fast ones it is allowed on, as many as its quota pays.

A container is often limited by a quota of processor time (`docker run --cpus 2`), not by a set of
processors. More threads than the quota then do not compute more: they use it up sooner, and all of
them stand still for the rest of each period.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

QuotaOf = Callable[[Path], float | None]


def available_processors() -> int:
    """How many threads of this process can compute at once.

    Returns:
        The processors that it may run on (its affinity) without the efficiency cores of laptops,
        and no more than its quota in whole processors, at least 1. Without the native core, which
        knows them, efficiency cores count.

    Example:
        >>> available_processors() >= 1
        True
    """
    processors = _fast_processors()
    quota = quota_of_processors()
    return processors if quota is None else max(1, min(processors, round(quota)))


def _fast_processors() -> int:
    try:
        core = importlib.import_module("anymamba._core")
    except ModuleNotFoundError:
        allowed = getattr(os, "sched_getaffinity", None)  # not on every system
        return len(allowed(0)) if allowed else os.cpu_count() or 1
    return int(core.default_threads())


def quota_of_processors(root: Path = Path("/")) -> float | None:
    """The processor time that this process may use, in processors.

    Args:
        root: where `proc` and `sys` are.

    Returns:
        The smallest quota of its control group and of those around it (cgroup v1 and v2); None
        where there is none.

    Example:
        >>> quota_of_processors(Path("nowhere")) is None
        True
    """
    return min(_quotas(root), default=None)


def _quotas(root: Path) -> Iterator[float]:
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError):
        return
    mounted = root / "sys/fs/cgroup"
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, place = rest.partition(":")
        if not controllers:  # version 2, which may be mounted beside version 1
            for top in (mounted, mounted / "unified"):
                yield from _quotas_of_groups(top, place, _quota_of_version_2)
        elif "cpu" in controllers.split(","):
            for top in {mounted / "cpu", mounted / controllers}:
                yield from _quotas_of_groups(top, place, _quota_of_version_1)


def _quotas_of_groups(top: Path, place: str, quota_of: QuotaOf) -> Iterator[float]:
    """The quotas of a group and of all around it.

    A container often sees its own group as the top, while `place` is a path outside of it: where a
    folder is missing, those above it count.
    """
    inside = PurePosixPath(place.lstrip("/"))
    for group in (inside, *inside.parents):
        if ".." in group.parts:
            continue
        with suppress(OSError, ValueError, ZeroDivisionError):
            quota = quota_of(top / group)
            if quota is not None and quota > 0:
                yield quota


def _quota_of_version_2(group: Path) -> float | None:
    quota, period = (group / "cpu.max").read_text(encoding="utf-8").split()
    return None if quota == "max" else int(quota) / int(period)


def _quota_of_version_1(group: Path) -> float | None:
    quota = int((group / "cpu.cfs_quota_us").read_text(encoding="utf-8"))
    return (
        quota / int((group / "cpu.cfs_period_us").read_text(encoding="utf-8"))
        if quota > 0
        else None
    )
