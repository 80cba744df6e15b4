"""From a model's name to an engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anymamba.checkpoint import open_checkpoint, resolve
from anymamba.checkpoint.json_object import read_json_object
from anymamba.checkpoint.paths import user_path
from anymamba.runtime.engine import Engine
from anymamba.runtime.gguf_names import is_gguf
from anymamba.runtime.kinds import check_kind
from anymamba.runtime.native import wanted_threads
from anymamba.runtime.tokenizer import read_tokenizer, tokenizer_from_json
from anymamba.runtime.weights import load_weights

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["load"]


def load(
    model: str | os.PathLike[str] | None = None,
    weights: str = "auto",
    threads: int | None = None,
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    offline: bool = False,
    subfolder: str | None = None,
) -> Engine:
    """Open a model for the torch-free runtime.

    Args:
        model: a folder in any layout, a GGUF file, or a hub id; None for the bundled model.
        weights: how the weights are kept. "auto": as they are stored, mapped from the file.
            "f32", "bf16": in that type. "int8", "int4": rounded to so many bits now, which takes
            seconds; `anymamba quantize` does it once.
        threads: how many threads compute; None takes `ANYMAMBA_NUM_THREADS`, else all processors.
        tokenizer: a folder with a tokenizer.json, or that file, where the model comes without one.
        revision, cache_dir, token, offline, subfolder: which of the hub's models, and how it is
            fetched, as `anymamba.checkpoint.resolve` has them.

    Returns:
        An engine, ready to read and write.

    Raises:
        HubError: the model is neither here nor to be had from the hub.
        CheckpointError: files are missing or broken, pickled, or do not fit the config.
        ConfigError: `weights` is none of these, or cannot be made of what is stored.
        InputError: `threads` makes no sense.
        MissingDependencyError: the native core is not installed.

    Example:
        >>> engine = load(weights="f32", threads=1)
        >>> engine
        Engine(3,045,888 parameters, f32, 1 threads)
    """
    check_kind(weights)
    wanted_threads(threads)  # a mistake shows before the weights are converted
    if model is None:
        from anymamba.assets import bundled_model

        model = bundled_model()
    place = user_path(model)
    if is_gguf(place):
        return _load_gguf(place, weights, tokenizer, threads)
    folder = resolve(
        model,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        offline=offline,
        subfolder=subfolder,
    )
    checkpoint = open_checkpoint(folder)
    return Engine(
        load_weights(checkpoint, weights),
        _tokenizer_in(folder, tokenizer),
        _end_ids(folder, checkpoint.config),
        threads,
    )


def _load_gguf(
    path: Path, weights: str, named: str | os.PathLike[str] | None, threads: int | None
) -> Engine:
    from anymamba.runtime.gguf_weights import load_gguf_weights

    loaded, model = load_gguf_weights(path, weights, tokenizer=named is None)
    open_tokenizer: Callable[[], Tokenizer] | None = None
    if named is not None:
        open_tokenizer = partial(read_tokenizer, named)
    elif model.tokenizer_json is not None:
        where = f"the tokenizer in {str(path)!r}"
        open_tokenizer = partial(tokenizer_from_json, model.tokenizer_json, where)
    end = model.config.get("eos_token_id")
    return Engine(loaded, open_tokenizer, [] if end is None else [end], threads)


def _tokenizer_in(
    folder: Path, named: str | os.PathLike[str] | None
) -> Callable[[], Tokenizer] | None:
    """What opens the tokenizer: the one that was named, else the model's, if it has one."""
    if named is not None:
        return partial(read_tokenizer, named)
    path = folder / "tokenizer.json"
    return partial(read_tokenizer, path) if path.is_file() else None


def _end_ids(folder: Path, config: Mapping[str, Any]) -> list[int]:
    """The tokens that end a text, as Transformers finds them."""
    settings = folder / "generation_config.json"
    fields = read_json_object(settings) if settings.is_file() else config
    # Transformers' default for a Mamba that says nothing.
    found = fields.get("eos_token_id", None if fields is not config else 0)
    ids = found if isinstance(found, list) else [found]
    return [id for id in ids if type(id) is int]
