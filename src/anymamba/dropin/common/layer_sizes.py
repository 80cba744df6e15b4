"""The sizes that layers are made with, checked before anything is allocated."""

from __future__ import annotations

import math
from numbers import Integral, Real

from anymamba.errors import ConfigError


def check_sizes(**sizes: object) -> None:
    """Refuse sizes, by the names of a layer's arguments, that are not whole numbers from 1 up.

    Example:
        >>> check_sizes(d_state=0)
        Traceback (most recent call last):
            ...
        anymamba.errors.ConfigError: d_state must be a whole number of at least 1, got 0
    """
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, Integral) or size < 1:
            raise ConfigError(f"{name} must be a whole number of at least 1, got {size!r}")


def inner_width(d_model: int, expand: object) -> int:
    """The inner width of a layer, e = int(expand * d_model), which must not be 0.

    Example:
        >>> inner_width(10, 1.5)
        15
    """
    check_sizes(d_model=d_model)
    if isinstance(expand, bool) or not isinstance(expand, Real) or not math.isfinite(expand):
        raise ConfigError(f"expand must be a number, got {expand!r}")
    width = int(float(expand) * d_model)
    if width < 1:
        raise ConfigError(f"expand must be at least 1 / d_model, got {expand!r}")
    return width
