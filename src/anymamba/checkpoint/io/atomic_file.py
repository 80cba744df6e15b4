"""Writing files so that a reader sees the old one or the new one, never half of one."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from anymamba.checkpoint.io.paths import of_any_length, user_path
from anymamba.errors import AnyMambaError, CheckpointError

_ADVICE = {
    errno.ENOSPC: "free some space, or choose another place",
    errno.EDQUOT: "free some space, or choose another place",
    errno.EFBIG: "choose a place that takes files of this size",
    errno.ENOENT: "give a place in an existing folder",
    errno.ENOTDIR: "give a place in an existing folder",
    errno.EIO: "the disk may be broken: choose another place",
}

_PLACE_ADVICE = "choose a place that you may write to"
_IN_USE_ADVICE = "end the programs that have it open, a model that was loaded from it for example"

# What Windows says of a file or folder that a process has open or mapped: sharing violation, lock
# violation, user-mapped section. "Access denied" it says of such ones, too, but mostly of those
# that one may not write to.
_IN_USE = (32, 33, 1224)
_ACCESS_DENIED = 5
_PAUSES = (0.01, 0.04, 0.15, 0.4)
"""Seconds between attempts to rename what is in use."""


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Create or replace a file in one step.

    `write` fills a file of the same name in a temporary folder beside the target; it is then
    flushed to disk and renamed. If anything fails, the target stays as it was and the temporary
    folder is removed. A link is followed: the file it points to is replaced. What replaces a file
    has its permissions: a private one stays private.

    Windows replaces no file that a process has open or mapped, as the weights of a loaded model
    are. Such a target stays, too, and the error says so.

    Args:
        path: the file to create or replace.
        write: called once with the path to write to. What it raises is passed on, an `OSError`
            as a `CheckpointError`.

    Raises:
        CheckpointError: the target is a folder or a device, or in use on Windows; its folder does
            not exist or cannot be written to; or the disk is full.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> target = Path(tempfile.mkdtemp()) / "state.txt"
        >>> write_atomically(target, lambda path: path.write_text("ready"))
        >>> target.read_text()
        'ready'
    """
    target = Path(os.path.realpath(user_path(path)))
    # To rename a file over /dev/null would be the end of it.
    if target.exists() and not target.is_file():
        raise CheckpointError(f"cannot write {str(target)!r}: it is not a file; give another name")
    with workplace_beside(target) as workplace:
        unfinished = workplace / target.name
        write(unfinished)
        flush_to_disk(unfinished)
        if target.exists():  # after the flush, which takes a file that can be written to
            shutil.copymode(target, unfinished)
        move_into_place(unfinished, target)


def move_into_place(made: Path, target: Path) -> None:
    """Rename a file or folder; a file replaces one of that name.

    Windows refuses this while a process has one of them open, which for an instant virus scanners
    do with all that is new: it is tried again for about half a second.

    Raises:
        OSError: the system refuses it.

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "new").write_text("ready")
        >>> move_into_place(folder / "new", folder / "state.txt")
        >>> (folder / "state.txt").read_text()
        'ready'
    """
    for pause in _PAUSES:
        try:
            made.replace(target)
        except PermissionError as error:
            if _windows_code(error) not in (*_IN_USE, _ACCESS_DENIED):
                raise
            time.sleep(pause)
        else:
            return
    made.replace(target)


def _windows_code(error: OSError) -> int | None:
    return getattr(error, "winerror", None)


@contextmanager
def workplace_beside(target: Path) -> Iterator[Path]:
    """A hidden folder on the same disk, to write in what is then renamed; in the end it is removed.

    Raises:
        CheckpointError: there can be no such folder, or what is done in it raises an `OSError`.
    """
    try:
        beside = of_any_length(target.parent)
        workplace = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}.", dir=beside))
        try:
            yield workplace
        finally:
            shutil.rmtree(workplace, ignore_errors=True)
        flush_to_disk(target.parent)
    except OSError as error:
        raise cannot_write(target, error) from error


def check_writable(
    path: str | os.PathLike[str], error: type[AnyMambaError] = CheckpointError
) -> None:
    """Refuse a file that `write_atomically` could not write, before the work that goes into it.

    Args:
        path: the file to create or replace.
        error: what to raise.

    Raises:
        AnyMambaError: it is a folder or a device; or its folder does not exist or cannot be
            written to.

    Example:
        >>> check_writable(Path(tempfile.mkdtemp()) / "new.state")
    """
    target = Path(os.path.realpath(user_path(path, error)))
    folder, refused = target.parent, f"cannot write {str(path)!r}"
    if not folder.is_dir():
        raise error(f"{refused}: the folder {str(folder)!r} does not exist")
    if target.is_dir():
        raise error(f"{refused}: it is a folder; give a file in it")
    if target.exists() and not target.is_file():
        raise error(f"{refused}: it is not a file; give another name")
    if not os.access(folder, os.W_OK):
        raise error(
            f"{refused}: you may not write to the folder {str(folder)!r}; choose another place"
        )


def cannot_write(target: Path, error: OSError) -> CheckpointError:
    """What to tell a user whose file or folder the system did not write; an error of ours stays.

    Example:
        >>> print(cannot_write(Path("a.state"), OSError(errno.ENOSPC, "No space left on device")))
        cannot write 'a.state': No space left on device; free some space, or choose another place
    """
    if isinstance(error, CheckpointError):
        return error
    advice = _ADVICE.get(error.errno or 0, _PLACE_ADVICE)
    if _windows_code(error) in _IN_USE:
        advice = f"{_IN_USE_ADVICE}, or {_PLACE_ADVICE}"
    elif _windows_code(error) == _ACCESS_DENIED:
        advice = f"{_PLACE_ADVICE}, or {_IN_USE_ADVICE}"
    return CheckpointError(f"cannot write {str(target)!r}: {error.strerror or error}; {advice}")


def flush_to_disk(path: Path) -> None:
    """Ask the system to bring a file, or a folder's list of names, to the disk itself.

    Raises:
        OSError: the disk did not take it.

    Example:
        >>> flush_to_disk(Path(tempfile.mkdtemp()))
    """
    is_folder = path.is_dir()
    try:
        # Windows flushes only what is open for writing; a folder opens only for reading.
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    except PermissionError:
        if is_folder:  # no folder opens on Windows, elsewhere none that we may not list
            return
        raise
    try:
        _flush(descriptor)
    finally:
        os.close(descriptor)


def _flush(descriptor: int) -> None:
    # On macOS, fsync leaves the data in the memory of the drive.
    with suppress(ImportError, KeyError, OSError):  # OSError: some disks of a network
        import fcntl

        fcntl.fcntl(descriptor, vars(fcntl)["F_FULLFSYNC"])
        return
    os.fsync(descriptor)
