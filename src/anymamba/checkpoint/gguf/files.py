"""Which GGUF file a model is in: the one that is named, or the only one of a folder."""

from __future__ import annotations

import re
from pathlib import Path

from anymamba.checkpoint.files import WEIGHT_NAMES
from anymamba.checkpoint.gguf.names import is_gguf
from anymamba.checkpoint.io import listed, shown
from anymamba.errors import CheckpointError

PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})(\.gguf)", re.IGNORECASE)
"""The name of a part of a model: what it is called, its number from 1, how many there are."""

# What lies beside models and is none: projectors of images, importances of weights.
_COMPANIONS = ("mmproj", "imatrix")


def find_gguf(place: Path) -> Path | None:
    """The GGUF file that a place stands for, if it stands for one.

    Args:
        place: a file, a folder, or a name on the hub.

    Returns:
        A file whose name ends in `.gguf`, whether it exists or not; of a folder without weights of
        another form the GGUF file in it, of a model in parts the first; else None.

    Raises:
        CheckpointError: the folder holds several models, or cannot be read.

    Example:
        >>> find_gguf(Path("model.gguf")), find_gguf(Path("state-spaces/mamba-130m-hf"))
        (PosixPath('model.gguf'), None)
    """
    if not place.is_dir():
        return place if is_gguf(place) else None
    if any((place / name).is_file() for name in WEIGHT_NAMES):
        return None
    try:
        files = sorted(entry for entry in place.iterdir() if is_gguf(entry) and entry.is_file())
    except OSError as error:
        raise CheckpointError(f"cannot read {str(place)!r}: {error.strerror}") from error
    models = [file for file in files if _is_model(file.name)]
    if len(models) > 1:
        names = listed(shown(file.name) for file in models)
        raise CheckpointError(f"{str(place)!r} holds several GGUF files, {names}; name one of them")
    return models[0] if models else None


def _is_model(name: str) -> bool:
    part = PART.fullmatch(name)
    later = part is not None and int(part[2]) != 1
    return not later and not any(word in name.lower() for word in _COMPANIONS)
