"""The packages `mamba_ssm` and `causal_conv1d` themselves, whoever answers under their names.

The drop-in answers under the names of these two and of their compiled extensions, which programs
import as modules of their own. Where the originals are installed too, their modules are then kept
apart: out of `sys.modules`, but within reach of this file. A package that a program brings itself,
a fork, can be left alone.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import ModuleType

PACKAGES = ("mamba_ssm", "causal_conv1d")
EXTENSIONS = ("selective_scan_cuda", "causal_conv1d_cuda")
NAMES = PACKAGES + EXTENSIONS

_apart: dict[str, ModuleType] | None = None
_left_alone: frozenset[str] = frozenset()
_lock = threading.RLock()
_loading = threading.local()


def is_original_installed(name: str) -> bool:
    """Whether an original can be imported, which is found out without importing it."""
    if name in (sys.modules if _apart is None else _apart):
        return True
    # `importlib.util.find_spec` would ask the drop-in first.
    return any(
        finder.find_spec(name, None) is not None
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


def is_left_alone(name: str) -> bool:
    """Whether a package is the program's own, which the drop-in does not answer for."""
    return name in _left_alone


def keep_apart(apart: bool, leave: Collection[str] = ()) -> None:
    """Take the originals' modules out of `sys.modules`, or bring them back.

    What else is there under their names is removed. Modules that were loaded apart are brought
    back too: to import them a second time would register their operators twice.

    Args:
        apart: which of the two.
        leave: packages whose modules stay where they are.
    """
    global _apart, _left_alone
    with _lock:
        if apart and _apart is None:
            _left_alone = frozenset(leave)
            _apart = _take()
        elif not apart and _apart is not None:
            _take()
            sys.modules.update(_apart)
            _apart, _left_alone = None, frozenset()


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
    """Remove from `sys.modules` what stands under the answered names, and return it."""
    answered = set(NAMES) - _left_alone
    names = [name for name in sys.modules if name.partition(".")[0] in answered]
    return {name: sys.modules.pop(name) for name in names}
