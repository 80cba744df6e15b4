"""Paths as users give them."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from anymamba.checkpoint.io.messages import shown
from anymamba.errors import AnyMambaError, CheckpointError


def user_path(path: str | os.PathLike[str], error: type[AnyMambaError] = CheckpointError) -> Path:
    """A path with `~` written out, that the system can look up; whether it exists is not asked.

    What no system call would take is refused here, so that what uses the path need not.

    Args:
        path: as it was given.
        error: what to raise.

    Raises:
        AnyMambaError: it is no path, is empty, holds a null character or too long a name, or leads
            through a folder that is closed to us.

    Example:
        >>> user_path("~/home.state") == Path.home() / "home.state"
        True
        >>> user_path("a" * 1000)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        anymamba.errors.CheckpointError: cannot use the path 'aaa...aaa': File name too long
    """
    try:
        place = Path(path)
    except TypeError:
        raise error(f"expected a path, got {shown(path)}") from None
    if path == "":  # Path takes it for the folder that one happens to be in
        raise error("expected a path, got '': name a file or a folder")
    with suppress(RuntimeError):  # shells, too, leave ~ where they know no such user
        place = place.expanduser()
    try:
        place.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as cause:
        reason = cause.strerror if isinstance(cause, OSError) else cause
        raise error(f"cannot use the path {shown(str(path))}: {reason}") from None
    return place
