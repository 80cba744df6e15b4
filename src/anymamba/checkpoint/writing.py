"""Writing files so that a reader sees the old one or the new one, never half of one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from anymamba.errors import CheckpointError

__all__ = ["write_atomically"]


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Create or replace a file in one step.

    `write` fills a file of the same name in a temporary folder beside the target; it is then
    flushed to disk and renamed. If anything fails, the target stays as it was and the temporary
    folder is removed. A link is followed: the file it points to is replaced.

    Args:
        path: the file to create or replace.
        write: called once with the path to write to. What it raises is passed on.

    Raises:
        CheckpointError: the folder does not exist or cannot be written to.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> target = Path(tempfile.mkdtemp()) / "state.txt"
        >>> write_atomically(target, lambda path: path.write_text("ready") and None)
        >>> target.read_text()
        'ready'
    """
    target = Path(os.path.realpath(path))
    try:
        workplace = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}.", dir=target.parent))
    except OSError as error:
        raise CheckpointError(
            f"cannot write {str(target)!r}: {error.strerror}; give a file in an existing folder "
            "that you may write to"
        ) from error
    try:
        unfinished = workplace / target.name
        write(unfinished)
        _flush(unfinished)
        _rename(unfinished, target)
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
    if os.name == "posix":  # Windows cannot open a folder to flush it
        _flush(target.parent)


def _rename(source: Path, target: Path) -> None:
    try:
        source.replace(target)
    except OSError as error:
        raise CheckpointError(f"cannot replace {str(target)!r}: {error.strerror}") from error


def _flush(path: Path) -> None:
    """Ask the system to bring a file, or a folder's list of names, to the disk itself."""
    # Windows flushes only what is open for writing; a folder opens only for reading.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
