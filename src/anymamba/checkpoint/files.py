"""Which files of a folder hold the weights."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from anymamba.checkpoint.io import listed, read_json_object, shown
from anymamba.errors import CheckpointError

# Whole or in shards; safetensors first, since reading a pickle needs torch and care. Codestral has
# its weights twice: `consolidated` has the names of Mistral's own program.
SAFETENSORS_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "consolidated.safetensors",
)
_PICKLE_NAMES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
WEIGHT_NAMES = (*SAFETENSORS_NAMES, *_PICKLE_NAMES)
"""The files that are looked for, in this order, where no variant is named."""

ADAPTER_NAMES = ("adapter_config.json", "adapter_model.safetensors")
"""An adapter of PEFT's, which a folder may hold alone or beside a model."""


@dataclass(frozen=True)
class WeightFiles:
    """A model's weight files.

    Args:
        paths: the files, each once, in order of their names.
        pickled: whether they are torch's pickles rather than safetensors.
        index: for shards, the file's name by the tensor's; None for a single file.
    """

    paths: tuple[Path, ...]
    pickled: bool
    index: dict[str, str] | None = None


def find_weight_files(
    folder: str | os.PathLike[str],
    *,
    variant: str | None = None,
    use_safetensors: bool | None = None,
) -> WeightFiles:
    """Find a model's weight files.

    Args:
        folder: the model's folder.
        variant: which of several sets of weights, by the word that Transformers writes into the
            names of its files: `model.fp16.safetensors` has the variant `fp16`.
        use_safetensors: True for safetensors only, False for pickles only, None for whichever
            is there, safetensors first.

    Returns:
        The first that exists of `model.safetensors`, its shards, `pytorch_model.bin`, its
        shards. All the files named are there.

    Raises:
        CheckpointError: there are none, a shard is missing, or an index is broken or names
            files that are not in the folder.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "model.safetensors").write_bytes(b"")
        >>> [path.name for path in find_weight_files(folder).paths]
        ['model.safetensors']
    """
    folder = Path(folder)
    wanted = [] if use_safetensors is False else list(SAFETENSORS_NAMES)
    wanted += [] if use_safetensors else list(_PICKLE_NAMES)
    for name in wanted:
        path = folder / _of_variant(name, variant)
        if not path.is_file():
            continue
        pickled = name in _PICKLE_NAMES
        if not name.endswith(".json"):
            return WeightFiles((path,), pickled)
        index = _read_index(path, ".bin" if pickled else ".safetensors")
        return WeightFiles(_shards(folder, index, path), pickled, index)
    raise CheckpointError(_nothing_found(folder, [_of_variant(name, variant) for name in wanted]))


def _of_variant(name: str, variant: str | None) -> str:
    """The name of a file of a variant: the word stands before the last ending."""
    if variant is None:
        return name
    if not isinstance(variant, str) or not variant or any(sign in variant for sign in "/\\:\0"):
        raise CheckpointError(
            f"variant must be a word that is part of a file's name, such as 'fp16', got "
            f"{shown(variant)}"
        )
    stem, _, ending = name.rpartition(".")
    return f"{stem}.{variant}.{ending}"


def _read_index(path: Path, ending: str) -> dict[str, str]:
    index = read_json_object(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(
            f"{str(path)!r} must have a weight_map from tensors to files, got {shown(index)}"
        )
    for tensor, shard in index.items():
        # A shard named ../secret would have us read outside of the model's folder.
        plain = isinstance(shard, str) and not any(sign in shard for sign in "/\\:\0")
        if not plain or not shard.endswith(ending):
            raise CheckpointError(
                f"{str(path)!r} places tensor {shown(tensor)} in {shown(shard)}, "
                f"expected the plain name of a {ending} file beside it"
            )
    return index


def _shards(folder: Path, index: dict[str, str], path: Path) -> tuple[Path, ...]:
    shards = tuple(folder / name for name in sorted(set(index.values())))
    missing = [shown(shard.name) for shard in shards if not shard.is_file()]
    if missing:
        raise CheckpointError(
            f"{str(folder)!r} lacks {listed(missing)}, named in {path.name}; fetch the model again"
        )
    return shards


def _nothing_found(folder: Path, wanted: list[str]) -> str:
    try:
        there = sorted(shown(entry.name) for entry in folder.iterdir())
    except OSError as error:
        return f"cannot read the folder {str(folder)!r}: {error.strerror}"
    return (
        f"{str(folder)!r} holds no weights: looked for {', '.join(wanted)}; "
        f"found {listed(there) or 'nothing at all'}"
    )
