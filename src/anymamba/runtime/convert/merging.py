"""Writing a model with an adapter merged into it, without torch or PEFT."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from anymamba.checkpoint.architecture import EMBEDDINGS, HEAD
from anymamba.checkpoint.atomic_folder import check_apart, check_destination, write_folder
from anymamba.checkpoint.dtypes import as_float32
from anymamba.checkpoint.source import Source, companions_in, open_source
from anymamba.errors import ConfigError
from anymamba.runtime.adapters import Adapter, check_fits, merged, read_adapter
from anymamba.runtime.convert.conversion import FOLDER_WEIGHTS, write_files
from anymamba.runtime.loading import model_of


def merge(
    adapter: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
    weights: str | None = None,
    *,
    overwrite: bool = False,
    offline: bool = False,
) -> Path:
    """Merge an adapter into its model and write the result, in one step: all of it or nothing.

    Args:
        adapter: a folder with a LoRA or DoRA adapter of PEFT's.
        destination: the folder to write, in Transformers' layout. What the adapter's folder has
            of a tokenizer and of settings for generating counts in place of the model's.
        model: the model that it was trained on: a folder, a GGUF file, or a hub id; None for the
            one that the adapter names.
        weights: the matrices' type, one of `FOLDER_WEIGHTS`; by default as they are stored. The
            sums are made in float32 and rounded once.
        overwrite, offline: as for `convert`.

    Returns:
        The destination, links followed.

    Raises:
        CheckpointError: the adapter or the model is missing or broken, the two do not belong
            together, or the destination exists or cannot be written.
        ConfigError: there is no such type of weights.

    Example:
        >>> import json, tempfile
        >>> import numpy as np
        >>> from safetensors.numpy import save_file
        >>> from anymamba.assets import bundled_model
        >>> folder = Path(tempfile.mkdtemp())
        >>> fields = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
        >>> _ = (folder / "adapter_config.json").write_text(json.dumps(fields))
        >>> name = "base_model.model.backbone.embeddings.lora_embedding_"
        >>> v, d = open_source(bundled_model()).tensors["backbone.embeddings.weight"].shape
        >>> A, B = np.ones((1, v), np.float32), np.ones((d, 1), np.float32)
        >>> save_file({f"{name}A": A, f"{name}B": B}, folder / "adapter_model.safetensors")
        >>> result = merge(folder, folder / "merged", bundled_model())
        >>> json.loads((result / "config.json").read_text())["tie_word_embeddings"]
        False
    """
    if weights is not None and weights not in FOLDER_WEIGHTS:
        raise ConfigError(f"weights must be one of {', '.join(FOLDER_WEIGHTS)}, got {weights!r}")
    change = read_adapter(adapter)
    named = model_of(model, adapter)
    for read in (adapter, named):
        check_apart(read, destination)
    target = check_destination(destination, overwrite)
    source = with_adapter(open_source(named, offline), change)
    write_folder(target, lambda folder: write_files(folder, source, "transformers", weights))
    return target


def with_adapter(source: Source, adapter: Adapter) -> Source:
    """A model as it is with an adapter merged; each matrix is made when it is asked for.

    Raises:
        CheckpointError: the two do not fit together.
    """
    check_fits(adapter, source.tensors)
    config, dtypes = dict(source.config), dict(source.dtypes)
    unties = EMBEDDINGS in adapter.changes and config.get("tie_word_embeddings", True)
    if unties:
        config["tie_word_embeddings"] = False
        dtypes[HEAD] = dtypes[EMBEDDINGS]
    companions = dict(source.companions) | companions_in(adapter.folder)
    tensors = _Merged(source.tensors, adapter, HEAD if unties else None)
    return replace(source, config=config, dtypes=dtypes, companions=companions, tensors=tensors)


class _Merged(Mapping[str, NDArray[Any]]):
    """A model's tensors with an adapter merged, one at a time."""

    def __init__(
        self, tensors: Mapping[str, NDArray[Any]], adapter: Adapter, head: str | None
    ) -> None:
        self._tensors, self._changes, self._head = tensors, adapter.changes, head

    def __iter__(self) -> Iterator[str]:
        yield from (name for name in self._tensors if name != self._head)
        if self._head is not None:
            yield self._head

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> NDArray[Any]:
        # A head that was the embedding table becomes what the table was.
        tensor = self._tensors[EMBEDDINGS if name == self._head else name]
        if name not in self._changes:
            return tensor
        return merged(as_float32(tensor), self._changes[name], name)
