"""Writing a folder so that a reader sees all of it or none of it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from anymamba.checkpoint.files import ADAPTER_NAMES, SAFETENSORS_NAMES
from anymamba.checkpoint.hub import SMALL_FILES
from anymamba.checkpoint.io import (
    flush_to_disk,
    listed,
    move_into_place,
    shown,
    user_path,
    workplace_beside,
)
from anymamba.errors import CheckpointError, ConfigError

_KNOWN = (*SMALL_FILES, *SAFETENSORS_NAMES, *ADAPTER_NAMES, "README.md", "LICENSE")
_PATTERNS = ("model-*.safetensors", "pytorch_model*.bin", "pytorch_model*.bin.index.json")


def check_apart(source: str | os.PathLike[str], destination: str | os.PathLike[str]) -> None:
    """Refuse a destination that is the source, which is read, or a folder around it.

    Raises:
        ConfigError: writing would replace the source.

    Example:
        >>> check_apart("model", "model-int4")
    """
    real, target = (Path(os.path.realpath(user_path(path))) for path in (source, destination))
    if any(_is_same(target, place) for place in (real, *real.parents)):
        raise ConfigError(
            f"the destination {str(target)!r} would replace the source; choose another place"
        )


def _is_same(one: Path, other: Path) -> bool:
    # A folder may have several names: capitals do not count on most Macs, nor on Windows.
    return one == other or (one.exists() and other.exists() and one.samefile(other))


def check_destination(
    destination: str | os.PathLike[str], overwrite: bool, *, file: bool = False
) -> Path:
    """Refuse to write where something is, unless it is to be overwritten and is a model.

    Args:
        destination: the folder or file that is to be written.
        overwrite: whether a model that is there may go.
        file: whether a file is to be written rather than a folder.

    Returns:
        The destination, links followed.

    Raises:
        CheckpointError: it exists, and is not to be overwritten, is of the other kind, or holds
            other files than a model's; or the folder that it is to lie in does not exist.

    Example:
        >>> folder = tempfile.mkdtemp()
        >>> check_destination(os.path.join(folder, "new"), overwrite=False).name
        'new'
        >>> check_destination(folder, overwrite=False)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        anymamba.errors.CheckpointError: '...' exists; choose another place, ...
    """
    target = Path(os.path.realpath(user_path(destination)))
    if not target.parent.is_dir():
        raise CheckpointError(
            f"cannot write {str(target)!r}: the folder {str(target.parent)!r} does not exist"
        )
    if target.exists() and not overwrite:
        raise CheckpointError(
            f"{str(target)!r} exists; choose another place, or pass overwrite=True (on the command "
            "line --overwrite)"
        )
    if target.exists() and target.is_dir() == file:
        is_there, wanted = ("file", "folder") if target.is_file() else ("folder", "file")
        raise CheckpointError(
            f"{str(target)!r} is a {is_there}, and a {wanted} is to be written; "
            "choose another place"
        )
    if target.is_dir():
        others = [shown(entry.name) for entry in sorted(target.iterdir()) if not _is_known(entry)]
        if others:
            raise CheckpointError(
                f"{str(target)!r} holds more than a model ({listed(others)}), which overwriting "
                "it would delete; choose another place, or remove it yourself"
            )
    return target


def _is_known(entry: Path) -> bool:
    named = entry.name in _KNOWN or any(entry.match(pattern) for pattern in _PATTERNS)
    return named and not entry.is_dir()


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Create a folder in one step, or replace one.

    `write` fills a folder of the same name inside a hidden one beside the target; all is flushed
    to disk, then renamed. Whatever fails, there is no half target; a killed process leaves the
    hidden folder behind. A folder that is replaced is set aside first, is back if that fails, and
    is removed only once the new one has its place.

    Args:
        target: what `check_destination` returned.
        write: called once with the folder to fill. What it raises is passed on, an `OSError` as
            a `CheckpointError`.

    Raises:
        CheckpointError: the folder cannot be written, or the disk is full. Where the system then
            refuses to put back the one that was there, it says where that is.

    Example:
        >>> target = Path(tempfile.mkdtemp()) / "model"
        >>> write_folder(target, lambda folder: (folder / "config.json").write_text("{}") and None)
        >>> [entry.name for entry in target.iterdir()]
        ['config.json']
    """
    with workplace_beside(target) as workplace:
        unfinished = workplace / target.name
        unfinished.mkdir()
        write(unfinished)
        for entry in (*unfinished.iterdir(), unfinished):
            flush_to_disk(entry)
        if target.is_dir():
            _replace(target, unfinished, workplace.parent)
        else:
            move_into_place(unfinished, target)


def _replace(target: Path, unfinished: Path, beside: Path) -> None:
    """Put a finished folder in another's place, and remove that one once this is there."""
    # Beside the workplace, not in it: whatever fails, that one is removed.
    holder = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}.", dir=beside))
    aside = holder / target.name
    try:
        move_into_place(target, aside)
        move_into_place(unfinished, target)
    except BaseException:  # Ctrl-C, too
        if not target.exists():
            _restore(target, aside)
        raise
    finally:
        if target.exists():
            shutil.rmtree(holder, ignore_errors=True)


def _restore(target: Path, aside: Path) -> None:
    try:
        move_into_place(aside, target)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {str(target)!r}, and cannot put back what was there: "
            f"{error.strerror or error}; it is now {str(aside)!r}: move it back yourself"
        ) from error
