"""Files that a picture is written to."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from anymamba.checkpoint.io import check_writable, user_path
from anymamba.errors import InputError, MissingDependencyError


def check_picture(name: str, drawn: Sequence[str], written: Sequence[str] = ()) -> Path:
    """Refuse a place or a type of picture before the work that would go into it.

    Args:
        name: the file.
        drawn: the endings of files that matplotlib draws.
        written: the endings of files that need nothing.
    """
    file = user_path(name, InputError)
    if file.suffix not in (*drawn, *written):
        kinds = " or ".join((*drawn, *written))
        raise InputError(f"cannot draw {name!r}: expected a name that ends in {kinds}")
    check_writable(name, InputError)
    if file.suffix in drawn and find_spec("matplotlib") is None:
        other = f", or name a file that ends in {' or '.join(written)}" if written else ""
        raise MissingDependencyError(
            f"{name!r} needs the package 'matplotlib', which is not installed: pip install "
            f"matplotlib{other}"
        )
    return file
