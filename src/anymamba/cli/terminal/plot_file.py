"""Files that a picture is written to."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from anymamba.checkpoint.io import user_path, write_atomically
from anymamba.errors import InputError, MissingDependencyError


def check_picture(name: str, drawn: Sequence[str], written: Sequence[str] = ()) -> Path:
    """Refuse a place or a kind of picture before the work that would go into it.

    Args:
        name: the file.
        drawn: the endings of files that matplotlib draws.
        written: the endings of files that need nothing.

    Returns:
        The file.

    Raises:
        InputError: the file's kind is none of these, or its folder is not there.
        MissingDependencyError: matplotlib is not installed.
    """
    file = user_path(name, InputError)
    if file.suffix not in (*drawn, *written):
        kinds = " or ".join((*drawn, *written))
        raise InputError(f"cannot draw {name!r}: expected a name that ends in {kinds}")
    if file.is_dir() or not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise InputError(f"cannot write {name!r}: there is no folder for it that you may write to")
    if file.suffix in drawn and find_spec("matplotlib") is None:
        other = f", or name a file that ends in {' or '.join(written)}" if written else ""
        raise MissingDependencyError(
            f"{name!r} needs the package 'matplotlib', which is not installed: pip install "
            f"matplotlib{other}"
        )
    return file


def write_file(file: Path, data: bytes) -> None:
    """Write a picture, replacing what is there.

    Raises:
        CheckpointError: it cannot be written.
    """

    def write(unfinished: Path) -> None:
        unfinished.write_bytes(data)

    write_atomically(file, write)
