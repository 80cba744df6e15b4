"""Checkpoints that are complete or not there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from safetensors import SafetensorError

from anymamba.checkpoint.io import flush_to_disk, move_into_place
from anymamba.errors import TrainingError
from anymamba.renamed import old_names

CANNOT_WRITE = (OSError, RuntimeError, SafetensorError)
"""What torch, safetensors and Python raise where a disk is full."""

PARTIAL = ".partial"


def checkpoints_in(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, the oldest first."""
    found = []
    for entry in folder.glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", entry.name)
        if number and entry.is_dir():
            found.append((int(number[1]), entry))
    return [entry for _, entry in sorted(found)]


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint."""
    found = checkpoints_in(folder)
    return found[-1] if found else None


def keep_last(folder: Path, count: int) -> None:
    """Remove all but the newest checkpoints."""
    for entry in checkpoints_in(folder)[:-count]:
        remove(entry)


def remove(entry: Path) -> None:
    """Remove a folder so that no half of it is ever taken for a whole one."""
    if entry.exists():
        doomed = entry.with_name(f"{PARTIAL}-removed-{entry.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        move_into_place(entry, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def publish(partial: Path, target: Path) -> None:
    """Give a finished folder its name, once it is on the disk, and replace what has that name."""
    for entry in (*partial.rglob("*"), partial):
        flush_to_disk(entry)
    remove(target)
    move_into_place(partial, target)
    flush_to_disk(target.parent)


def not_written(what: str, error: BaseException, folder: Path) -> TrainingError:
    """The error for what could not be written, and what is left in the folder of checkpoints."""
    reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
    return TrainingError(
        f"cannot write {what}: {reason}; {what_is_left(folder)}. Free some space, then go on with "
        "--resume"
    )


def what_is_left(folder: Path) -> str:
    """The last checkpoint, as the end of a message."""
    last = last_checkpoint(folder)
    return "there is no checkpoint yet" if last is None else f"the last checkpoint is {str(last)!r}"


__getattr__ = old_names(__name__)
