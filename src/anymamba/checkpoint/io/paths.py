"""Paths as users give them."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path, PureWindowsPath

from anymamba.checkpoint.io.messages import shown
from anymamba.errors import AnyMambaError, CheckpointError

# Of a path to a folder; a file's may have 259 characters.
_MOST_ON_WINDOWS = 247


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
    if os.name == "nt" and len(str(place.absolute())) > _MOST_ON_WINDOWS:
        place = of_any_length(place)
    try:
        place.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as cause:
        reason = cause.strerror if isinstance(cause, OSError) else cause
        raise error(f"cannot use the path {shown(str(path))}: {reason}") from None
    return place


def of_any_length(path: Path) -> Path:
    """A path in the spelling in which Windows takes more than 259 characters; elsewhere as it is.

    Example:
        >>> of_any_length(Path("model")) == Path("model")
        True
    """
    return Path(extended(os.path.realpath(path))) if os.name == "nt" else path


def extended(path: str) -> str:
    r"""An absolute path of Windows with the prefix that lifts the limit on its length.

    Example:
        >>> print(extended(r"C:\models\mamba"), extended(r"\\server\share\mamba"))
        \\?\C:\models\mamba \\?\UNC\server\share\mamba
    """
    drive = PureWindowsPath(path).drive
    if drive.startswith("\\\\?\\"):
        return path
    return rf"\\?\UNC{path[1:]}" if drive.startswith("\\\\") else rf"\\?\{path}"
