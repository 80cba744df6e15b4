"""From a model's name to an engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anymamba.arithmetic import check_matmul_dtype
from anymamba.checkpoint import open_checkpoint, resolve
from anymamba.checkpoint.architecture import special_token
from anymamba.checkpoint.gguf import find_gguf
from anymamba.checkpoint.io import read_json_object, user_path
from anymamba.checkpoint.tokenizer import read_tokenizer, tokenizer_file, tokenizer_from_json
from anymamba.errors import CheckpointError
from anymamba.runtime.adapters import Adapter, base_model_of, merge_adapter, read_adapter
from anymamba.runtime.engine import Engine
from anymamba.runtime.generation import suggested_sampling
from anymamba.runtime.native import wanted_threads
from anymamba.runtime.weights import Weights, check_weight_type, load_gguf_weights, load_weights

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_GENERATION = "generation_config.json"


def load(
    model: str | os.PathLike[str] | None = None,
    weights: str = "auto",
    threads: int | None = None,
    *,
    matmul_dtype: str | None = None,
    deterministic: bool = False,
    adapter: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    offline: bool = False,
    subfolder: str | None = None,
) -> Engine:
    """Open a model for the torch-free runtime.

    Args:
        model: a folder in any layout, a GGUF file, a folder that holds one, or a hub id; None for
            the model that the adapter names, or without an adapter the bundled one.
        weights: how the weights are kept. "auto": as they are stored, mapped from the file.
            "f32", "bf16": in that type. "int8", "int4": rounded to so many bits now, which takes
            seconds; `anymamba quantize` does it once.
        threads: how many threads compute; None takes `ANYMAMBA_NUM_THREADS`, else all processors.
        matmul_dtype: what activations are when they are multiplied with bfloat16 weights.
            "float32": the same results on every processor. "bfloat16": rounded to it, which is
            coarser, and faster at reading prompts on AMD's processors since Zen 4; refused where
            the processor does not multiply bfloat16. None takes `ANYMAMBA_MATMUL_DTYPE`, else
            "float32".
        deterministic: whether a text's logits are the same bits whatever is computed beside it and
            however it is cut. 8- and 4-bit weights always are; others then decode up to a fifth
            slower (docs/native.md).
        adapter: a folder with a LoRA or DoRA adapter of PEFT's, which is merged now, in float32.
            A tokenizer.json or generation_config.json in it counts in place of the model's.
        tokenizer: a folder with a tokenizer.json, or that file, where the model comes without one.
        revision, cache_dir, token, offline, subfolder: which of the hub's models, and how it is
            fetched, as `anymamba.checkpoint.resolve` has them.

    Returns:
        An engine, ready to read and write.

    Raises:
        HubError: the model is neither here nor to be had from the hub.
        CheckpointError: files are missing or broken, pickled, or do not fit the config; or the
            adapter does not fit the model, or is of a kind that is not merged here.
        ConfigError: `weights` is none of these, or cannot be made of what is stored; or
            `matmul_dtype` is bfloat16, and the weights are not.
        BackendError: `matmul_dtype` is none of these, or not to be had here.
        InputError: `threads` makes no sense.
        MissingDependencyError: the native core is not installed.

    Example:
        >>> engine = load(weights="f32", threads=1)
        >>> engine
        Engine(3,045,888 parameters, f32, 1 threads)
    """
    check_weight_type(weights)
    wanted_threads(threads)  # a mistake shows before the weights are converted
    if matmul_dtype is not None:
        check_matmul_dtype(matmul_dtype, "matmul_dtype")
    change = None if adapter is None else read_adapter(adapter)
    place = user_path(model_of(model, adapter))
    if find_gguf(place) is None:
        place = resolve(
            model_of(model, adapter),
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            offline=offline,
            subfolder=subfolder,
        )
    own_tokenizer = _tokenizer_in(change)
    tokenizer = own_tokenizer if tokenizer is None else tokenizer
    # What is merged is brought into the type that was asked for afterwards.
    stored_type = weights if change is None else "auto"
    opened = _open(place, stored_type, tokenizer)
    if change is None:
        return _engine(opened, opened.weights, [], threads, matmul_dtype, deterministic)
    merged = merge_adapter(opened.weights, change, weights)
    return _engine(opened, merged, [change.folder], threads, matmul_dtype, deterministic)


def load_adapters(
    base: Engine,
    model: str | os.PathLike[str],
    adapters: Mapping[str, str | os.PathLike[str]],
    weights: str = "auto",
    *,
    matmul_dtype: str | None = None,
    deterministic: bool = False,
    tokenizer: str | os.PathLike[str] | None = None,
) -> dict[str, Engine]:
    """Open a model's adapters beside it, each an engine of its own.

    An adapter is merged: it takes the memory of the matrices that it changes. All others are the
    model's own, which is there once.

    Args:
        base: the model as `load` opened it, by the same arguments.
        model: its folder or GGUF file.
        adapters: folders with LoRA or DoRA adapters of PEFT's, by name.
        weights, matmul_dtype, deterministic, tokenizer: as for `load`.

    Returns:
        The engines by the same names; each is what `load(model, adapter=...)` opens.

    Raises:
        CheckpointError: an adapter does not fit the model, or is of a kind that is not merged here.

    Example:
        >>> from anymamba.assets import bundled_model
        >>> load_adapters(load(), bundled_model(), {})
        {}
    """
    engines: dict[str, Engine] = {}
    stored = _open(user_path(model), "auto", tokenizer)
    whole = replace(stored.weights, digest=cache(stored.weights.digest))  # once for all of them
    for name, folder in adapters.items():
        change = read_adapter(folder)
        own_tokenizer = _tokenizer_in(change)
        opened = stored
        if tokenizer is None and own_tokenizer is not None:
            opened = replace(stored, tokenizer=partial(read_tokenizer, own_tokenizer))
        merged = merge_adapter(whole, change, weights, base.weights)
        places, threads = [change.folder], base.threads
        engines[name] = _engine(opened, merged, places, threads, matmul_dtype, deterministic)
    return engines


@dataclass(frozen=True)
class _Opened:
    """A model's weights, and what comes with them.

    Args:
        weights: the weights.
        tokenizer: opens the tokenizer.
        ends: the tokens that the config has for a text's end.
        folder: where its other files are, if it is one.
    """

    weights: Weights
    tokenizer: Callable[[], Tokenizer] | None
    ends: object
    folder: Path | None = None


def _open(place: Path, weights: str, tokenizer: str | os.PathLike[str] | None) -> _Opened:
    """Open what is stored in a folder or a GGUF file."""
    file = find_gguf(place)
    if file is None:
        opened = _open_folder(place, weights)
    else:
        opened = _open_gguf(file, weights, tokenizer is None)
    if tokenizer is not None:
        return replace(opened, tokenizer=partial(read_tokenizer, tokenizer))
    return opened


def _open_folder(folder: Path, weights: str) -> _Opened:
    checkpoint, tokenizer = open_checkpoint(folder), tokenizer_file(folder)
    open_tokenizer = None if tokenizer is None else partial(read_tokenizer, tokenizer)
    ends = special_token(checkpoint.config, "eos_token_id")
    return _Opened(load_weights(checkpoint, weights), open_tokenizer, ends, folder)


def _open_gguf(file: Path, weights: str, tokenizer: bool) -> _Opened:
    stored, model = load_gguf_weights(file, weights, tokenizer=tokenizer)
    text, where = model.tokenizer_json, f"the tokenizer in {str(file)!r}"
    open_tokenizer = None if text is None else partial(tokenizer_from_json, text, where)
    return _Opened(stored, open_tokenizer, model.config.get("eos_token_id"))


def _tokenizer_in(change: Adapter | None) -> Path | None:
    """The folder of an adapter that brings a tokenizer of its own."""
    has_own = change is not None and (change.folder / "tokenizer.json").is_file()
    return change.folder if change is not None and has_own else None


def _engine(
    opened: _Opened,
    weights: Weights,
    places: Sequence[Path],
    threads: int | None,
    matmul_dtype: str | None,
    deterministic: bool,
) -> Engine:
    """The engine of these weights; a generation_config.json in `places` goes before its own."""
    places = [*places, *([] if opened.folder is None else [opened.folder])]
    settings = generation_config(places)
    ends = opened.ends if settings is None else settings.get("eos_token_id")
    suggested = suggested_sampling(settings or {})
    tokenizer, end_ids = opened.tokenizer, _ids_in(ends)
    return Engine(weights, tokenizer, end_ids, threads, suggested, matmul_dtype, deterministic)


def model_of(
    model: str | os.PathLike[str] | None, adapter: str | os.PathLike[str] | None
) -> str | os.PathLike[str]:
    """The model that is meant: that which is named, else the adapter's, else the bundled one.

    Raises:
        CheckpointError: the adapter is none, or names no model.

    Example:
        >>> model_of("my-model", None)
        'my-model'
    """
    if model is not None:
        return model
    if adapter is None:
        from anymamba.assets import bundled_model

        return bundled_model()
    named = base_model_of(adapter)
    if named is None:
        raise CheckpointError(
            f"the adapter in {os.fspath(adapter)!r} does not say which model it belongs to; name "
            "it: model=... (on the command line --model)"
        )
    return named


def generation_config(places: Sequence[Path]) -> dict[str, Any] | None:
    """The first of the folders' generation_config.json; None where there is none."""
    files = (place / _GENERATION for place in places)
    found = next((file for file in files if file.is_file()), None)
    return None if found is None else read_json_object(found)


def _ids_in(found: object) -> list[int]:
    """The tokens that end a text, of what Transformers takes for them."""
    ids = found if isinstance(found, list) else [found]
    return [id for id in ids if type(id) is int]
