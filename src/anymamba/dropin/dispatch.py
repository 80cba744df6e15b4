"""Which calls go to the original package: those with CUDA tensors, where it is installed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import ParamSpec, TypeVar

from anymamba.dropin.forks import explained
from anymamba.upstream import import_original

P = ParamSpec("P")
R = TypeVar("R")

OURS = "anymamba.dropin."

answering: set[str] = set()
"""The original packages and extensions that take calls with CUDA tensors; `install` fills it."""


def by_device(ours: Callable[P, R], module: str | None = None) -> Callable[P, R]:
    """Send calls with CUDA tensors to the original's function, and all others to this one.

    The original's function is the one of the same name in the module of the same path. It is
    called only where the original package is installed, and `install(force=True)` was not asked.

    Args:
        ours: a function in a module under `anymamba.dropin`.
        module: the original's module, where that is not the one of the same path.

    Example:
        >>> @by_device
        ... def double(x):
        ...     return 2 * x
        >>> double(21)
        42
    """
    module = module or ours.__module__.removeprefix(OURS)
    package = module.partition(".")[0]
    in_module = attrgetter(ours.__qualname__)
    ours_explained = explained(ours)

    @functools.wraps(ours)
    def dispatched(*args: P.args, **kwargs: P.kwargs) -> R:
        # The first test is all that a call costs where no original is installed.
        if package in answering and any_on_cuda((*args, *kwargs.values())):
            theirs: Callable[P, R] = in_module(import_original(module))
            return theirs(*args, **kwargs)
        return ours_explained(*args, **kwargs)

    return dispatched


def any_on_cuda(values: Iterable[object]) -> bool:
    """Whether one of the values is a tensor on CUDA, or a list or tuple that holds one."""
    for value in values:
        if getattr(value, "is_cuda", False) is True:
            return True
        if isinstance(value, list | tuple) and any_on_cuda(value):
            return True
    return False
