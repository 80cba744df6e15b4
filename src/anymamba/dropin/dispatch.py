"""Which calls go to the original package: those with CUDA tensors, where it is installed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

from anymamba.dropin.originals import originals

__all__ = ["by_device"]

P = ParamSpec("P")
R = TypeVar("R")

PREFIX = "anymamba.dropin."


def by_device(ours: Callable[P, R]) -> Callable[P, R]:
    """Send calls with CUDA tensors to the original's function, and all others to this one.

    The original's function is the one of the same name in the module of the same path. It is
    called only where the original package is importable, and `install(force=True)` was not asked.

    Args:
        ours: a function in a module under `anymamba.dropin`.

    Returns:
        A function with the same name, signature and docstring.

    Example:
        >>> from anymamba.dropin.dispatch import by_device
        >>> @by_device
        ... def double(x):
        ...     return 2 * x
        >>> double(21)
        42
    """
    module, name = ours.__module__.removeprefix(PREFIX), ours.__qualname__

    @functools.wraps(ours)
    def dispatched(*args: P.args, **kwargs: P.kwargs) -> R:
        # The first test is all that a call costs where there is no original.
        if originals.answer(module) and any_on_cuda((*args, *kwargs.values())):
            theirs: Callable[P, R] | None = originals.function(module, name)
            if theirs is not None:
                return theirs(*args, **kwargs)
        return ours(*args, **kwargs)

    return dispatched


def any_on_cuda(values: Iterable[object]) -> bool:
    """Whether one of the values is a tensor on CUDA, or a list or tuple that holds one."""
    for value in values:
        if getattr(value, "is_cuda", False) is True:
            return True
        if isinstance(value, list | tuple) and any_on_cuda(value):
            return True
    return False
