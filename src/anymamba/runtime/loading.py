"""From a model's name to an engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from anymamba.arithmetic import check_matmul_dtype
from anymamba.checkpoint import open_checkpoint, resolve
from anymamba.checkpoint.architecture import special_token
from anymamba.checkpoint.gguf import find_gguf
from anymamba.checkpoint.io import read_json_object, user_path
from anymamba.checkpoint.tokenizer import read_tokenizer, tokenizer_file, tokenizer_from_json
from anymamba.errors import CheckpointError
from anymamba.runtime.adapters import base_model_of, merge_adapter, read_adapter
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
    if change is not None and tokenizer is None and (change.folder / "tokenizer.json").is_file():
        tokenizer = change.folder
    model = model_of(model, adapter)
    file, places = find_gguf(user_path(model)), [] if change is None else [change.folder]
    if file is None:
        folder = resolve(
            model,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            offline=offline,
            subfolder=subfolder,
        )
        places.append(folder)
    settings = generation_config(places)
    suggested = suggested_sampling(settings or {})
    # What is merged is brought into the type that was asked for afterwards.
    stored_type = weights if change is None else "auto"
    if file is None:
        stored, open_tokenizer, ends = _open_folder(folder, stored_type)
    else:
        stored, open_tokenizer, ends = _open_gguf(file, stored_type, tokenizer is None)
    return Engine(
        stored if change is None else merge_adapter(stored, change, weights),
        open_tokenizer if tokenizer is None else partial(read_tokenizer, tokenizer),
        _ids_in(ends if settings is None else settings.get("eos_token_id")),
        threads,
        suggested,
        matmul_dtype,
    )


_Opened: TypeAlias = tuple[Weights, Callable[[], "Tokenizer"] | None, object]
"""The weights, what opens the tokenizer, and the tokens that the config has for a text's end."""


def _open_folder(folder: Path, weights: str) -> _Opened:
    checkpoint, tokenizer = open_checkpoint(folder), tokenizer_file(folder)
    open_tokenizer = None if tokenizer is None else partial(read_tokenizer, tokenizer)
    ends = special_token(checkpoint.config, "eos_token_id")
    return load_weights(checkpoint, weights), open_tokenizer, ends


def _open_gguf(file: Path, weights: str, tokenizer: bool) -> _Opened:
    stored, model = load_gguf_weights(file, weights, tokenizer=tokenizer)
    text, where = model.tokenizer_json, f"the tokenizer in {str(file)!r}"
    open_tokenizer = None if text is None else partial(tokenizer_from_json, text, where)
    return stored, open_tokenizer, model.config.get("eos_token_id")


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
