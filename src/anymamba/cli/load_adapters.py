"""The adapters in a folder, opened beside their model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from anymamba.cli.load_engine import model_place
from anymamba.cli.options.model import EngineOptions
from anymamba.errors import InputError

if TYPE_CHECKING:
    from anymamba.runtime.engine import Engine


def adapters_in(folder: str, most: int, tell: Callable[[str], object]) -> dict[str, Path]:
    """The adapters in a folder by the names of theirs, and a remark on each other folder in it.

    Raises:
        InputError: there is no such folder, it has no adapters, or more than allowed.
    """
    from anymamba.checkpoint.files import ADAPTER_NAMES
    from anymamba.checkpoint.io import user_path

    place, config_file = user_path(folder), ADAPTER_NAMES[0]
    if not place.is_dir():
        raise InputError(f"there is no folder {folder!r}, expected one with a folder an adapter")
    if (place / config_file).is_file():
        raise InputError(f"{folder!r} is an adapter itself: give the folder that it lies in")
    folders = sorted(path for path in place.iterdir() if path.is_dir() and path.name[0] != ".")
    found = {path.name: path for path in folders if (path / config_file).is_file()}
    for path in folders:
        if path.name not in found:
            tell(f"anymamba: {str(path)!r} is no adapter, and is left out: it has no {config_file}")
    if not 0 < len(found) <= most:
        raise InputError(
            f"{folder!r} has {len(found)} adapters, expected 1 to {most}: each takes the memory of "
            "the matrices that it changes; --most-adapters allows more"
        )
    return found


def open_adapters(
    options: EngineOptions, base: Engine, adapters: Mapping[str, Path]
) -> dict[str, Engine]:
    """Merge each adapter into the weights that it changes; the model has all others once."""
    from anymamba.runtime.loading import load_adapters

    return load_adapters(
        base,
        model_place(options),
        adapters,
        options.weights,
        matmul_dtype=options.matmul_dtype,
        deterministic=options.deterministic,
        tokenizer=options.tokenizer,
    )


def own_bytes(adapted: Engine, base: Engine) -> int:
    """What an adapter takes beside its model."""
    shared = {id(tensor) for tensor in base.weights.tensors.values()}
    tensors = adapted.weights.tensors.values()
    return sum(tensor.nbytes for tensor in tensors if id(tensor) not in shared)
