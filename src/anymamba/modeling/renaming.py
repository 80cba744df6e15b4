"""The old name of an argument, as long as Transformers takes it too."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from transformers.utils.deprecation import deprecate_kwarg

from anymamba.errors import InputError

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def takes_cache_params(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Let a function with an argument `cache` take it as `cache_params` as well, with a warning.

    Transformers renamed it in 5.24. Its own decorator does the work where the old name is given;
    every other call is spared that decorator's time, and `torch.compile` its code.

    Raises:
        InputError: at a call with both names.
    """
    renamed: Callable[_Arguments, _Result] = deprecate_kwarg(
        "cache_params", "5.40.0", new_name="cache"
    )(function)

    @wraps(function)
    def either(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if "cache_params" not in kwargs:
            return function(*args, **kwargs)
        if "cache" in kwargs:
            raise InputError("cache and its old name cache_params are both given: give cache alone")
        return renamed(*args, **kwargs)

    return either
