"""The packages `mamba_ssm` and `causal_conv1d` themselves, whoever answers under their names.

The drop-in answers under the names of these two. Where the originals are installed too, their
modules are then kept apart: out of `sys.modules`, but within reach of this file.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

__all__ = ["PACKAGES", "import_original", "is_loading", "is_original_installed", "keep_apart"]

PACKAGES = ("mamba_ssm", "causal_conv1d")

_apart: dict[str, ModuleType] | None = None
_lock = threading.RLock()
_loading = threading.local()


def is_original_installed(package: str) -> bool:
    """Whether an original package can be imported, which is found out without importing it."""
    if package in (sys.modules if _apart is None else _apart):
        return True
    # `importlib.util.find_spec` would ask the drop-in first.
    return any(
        finder.find_spec(package, None) is not None
        for finder in sys.meta_path
        if not getattr(finder, "is_drop_in", False)
    )


def import_original(name: str) -> ModuleType:
    """A module of an original package, which is imported if it was not before.

    Args:
        name: as programs write it, such as `mamba_ssm.ops.selective_scan_interface`.

    Raises:
        ImportError: it is not installed, or cannot be imported.
    """
    if _apart is None:
        return importlib.import_module(name)
    if name not in _apart:
        with _under_their_names(_apart):
            importlib.import_module(name)
    return _apart[name]


def is_loading() -> bool:
    """Whether this thread is importing an original, for which the drop-in steps aside."""
    return getattr(_loading, "depth", 0) > 0


def keep_apart(apart: bool) -> None:
    """Take the originals' modules out of `sys.modules`, or bring them back.

    What else is there under their names is removed. Modules that were loaded apart are brought
    back too: to import them a second time would register their operators twice.
    """
    global _apart
    with _lock:
        if apart and _apart is None:
            _apart = _take()
        elif not apart and _apart is not None:
            _take()
            sys.modules.update(_apart)
            _apart = None


@contextmanager
def _under_their_names(apart: dict[str, ModuleType]) -> Iterator[None]:
    """The originals in `sys.modules` and the drop-in out of the way, for as long as one loads."""
    with _lock:
        ours = _take()
        sys.modules.update(apart)
        _loading.depth = getattr(_loading, "depth", 0) + 1
        try:
            yield
        finally:
            _loading.depth -= 1
            apart.update(_take())
            sys.modules.update(ours)


def _take() -> dict[str, ModuleType]:
    """Remove from `sys.modules` what stands under the packages' names, and return it."""
    names = [name for name in sys.modules if name.partition(".")[0] in PACKAGES]
    return {name: sys.modules.pop(name) for name in names}
