"""What only forks of `mamba_ssm` have: names and arguments that the drop-in does not imitate.

Many programs, of vision above all, are written for a fork that keeps the package's name. An error
then says whose the name or argument is, and how to run the program with that fork.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

from anymamba.errors import ArgumentError

P = ParamSpec("P")
R = TypeVar("R")

OWN_PACKAGE = (
    "put the package that the program was written for in the program's folder, or install it, and "
    "leave it alone with `anymamba run --own mamba_ssm` or anymamba.dropin.install(own="
    "['mamba_ssm']): AnyMamba then answers its compiled extensions only"
)
"""What to do about a program that was written for a fork."""


class Fork(NamedTuple):
    """A fork, and what it alone has."""

    name: str
    place: str
    adds: tuple[str, ...]


FORKS = (
    Fork(
        "Vision Mamba",
        "https://github.com/hustvl/Vim, its folder mamba-1p1p1",
        (
            *("bimamba_type", "if_devide_out", "if_divide_out", "init_layer_scale"),
            *("bimamba_inner_fn", "bimamba_inner_ref", "BiMambaInnerFn"),
            *("mamba_inner_fn_no_out_proj", "MambaInnerFnNoOutProj"),
        ),
    ),
    Fork("VideoMamba", "https://github.com/OpenGVLab/VideoMamba", ("bimamba",)),
    Fork("SegMamba", "https://github.com/ge-xing/SegMamba", ("nslices",)),
    Fork("Vivim", "https://github.com/scott-yjyang/Vivim", ("nframes",)),
)


def fork_of(name: str) -> str | None:
    """The fork that a name or an argument comes from, and where it is; None if unknown.

    Example:
        >>> fork_of("nslices")
        'SegMamba (https://github.com/ge-xing/SegMamba)'
    """
    for fork in FORKS:
        if name in fork.adds:
            return f"{fork.name} ({fork.place})"
    return None


def explained(ours: Callable[P, R]) -> Callable[P, R]:
    """Let calls with arguments that a function does not have fail with an error that says why.

    Example:
        >>> @explained
        ... def double(x):
        ...     return 2 * x
        >>> double(x=21)
        42
    """

    @functools.wraps(ours)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return ours(*args, **kwargs)
        except TypeError:
            wrong = _wrong_arguments(ours, args, kwargs)
            if wrong is None:
                raise
        raise ArgumentError(wrong)

    return call


def _wrong_arguments(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    """Why arguments do not fit a signature, or None where they do."""
    signature = inspect.signature(function)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        name = function.__qualname__.removesuffix(".__init__")
        foreign = next((k for k in kwargs if k not in signature.parameters and fork_of(k)), None)
        whose = (
            f"{name}: {error}"
            if foreign is None
            else f"{name}: the argument {foreign!r} is {fork_of(foreign)}'s"
        )
        return (
            f"{whose}. AnyMamba stands for mamba_ssm 2.3 and causal_conv1d 1.7 here, and takes "
            f"their arguments (docs/drop-in.md lists them). For a fork or an older version, "
            f"{OWN_PACKAGE}"
        )
    return None
