"""Opening a model's folder: its layout, its config, and where each tensor is."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anymamba.checkpoint.architecture import to_transformers_name
from anymamba.checkpoint.config import Layout, read_config
from anymamba.checkpoint.files import WeightFiles, find_weight_files
from anymamba.checkpoint.io import listed, shown, user_path
from anymamba.checkpoint.safetensors import TensorRecord, read_header
from anymamba.errors import CheckpointError


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, opened: the config is read, the weights are located, none is loaded.

    Args:
        folder: where it is.
        layout: which program's files these are.
        config: the config's fields in Transformers' names.
        files: the files that hold the weights.
        tensors: where each tensor is, by Transformers' name. Empty when pickled: a pickle
            does not tell before it is loaded.
        key_mapping: what the caller has the stored names changed by, see `open_checkpoint`.
    """

    folder: Path
    layout: Layout
    config: dict[str, Any]
    files: WeightFiles
    tensors: Mapping[str, TensorRecord] = field(default_factory=dict)
    key_mapping: Mapping[str, str] | None = None

    @property
    def pickled(self) -> bool:
        """Whether the weights are torch's pickles rather than safetensors."""
        return self.files.pickled


def open_checkpoint(
    folder: str | os.PathLike[str],
    *,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    key_mapping: Mapping[str, str] | None = None,
) -> Checkpoint:
    """Open a model's folder, whichever layout it has. Needs no torch and reads no weights.

    Args:
        folder: a local folder; `resolve` turns a hub id into one.
        variant, use_safetensors: which of the folder's weights, as in `find_weight_files`.
        key_mapping: regular expressions and what each is replaced by in the stored names, for
            names that no layout knows; the result may be in any layout.

    Returns:
        What is there. Whether its tensors fit its config is for `check_tensors` to say.

    Raises:
        CheckpointError: the folder, the config or a weight file is missing or broken.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> import torch
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "config.json").write_text('{"d_model": 8, "n_layer": 1, "vocab_size": 9}')
        >>> save_file({"norm_f.weight": torch.ones(8)}, folder / "model.safetensors")
        >>> checkpoint = open_checkpoint(folder)
        >>> checkpoint.layout, checkpoint.tensors["backbone.norm_f.weight"].shape
        ('minimal', (8,))
    """
    folder = user_path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{str(folder)!r} is no folder; give the folder of a model")
    layout, config = read_config(folder)
    files = find_weight_files(folder, variant=variant, use_safetensors=use_safetensors)
    tensors = {} if files.pickled else _locate(files, key_mapping)
    return Checkpoint(folder, layout, config, files, tensors, key_mapping)


def _locate(files: WeightFiles, key_mapping: Mapping[str, str] | None) -> dict[str, TensorRecord]:
    stored: dict[str, TensorRecord] = {}
    for path in files.paths:
        tensors = read_header(path).tensors
        check_shard(files, path, tensors)
        stored |= tensors
    names = canonical_names(stored, files.paths[0], key_mapping)
    return {new: stored[old] for new, old in names.items()}


def check_shard(files: WeightFiles, path: Path, names: Iterable[str]) -> None:
    """Check that a file holds the tensors that the index places there, if any, and no others.

    Raises:
        CheckpointError: the message names what is missing or not listed.

    Example:
        >>> check_shard(WeightFiles((Path("model.safetensors"),), False), Path("model.safetensors"),
        ...             ["lm_head.weight"])
    """
    if files.index is None:
        return
    promised = {tensor for tensor, shard in files.index.items() if shard == path.name}
    held = set(names)
    if held != promised:
        differences = {
            "the index places there and it lacks": promised - held,
            "it holds and the index does not place there": held - promised,
        }
        told = "; ".join(
            f"{what} {listed(sorted(map(shown, names)))}"
            for what, names in differences.items()
            if names
        )
        raise CheckpointError(
            f"{str(path)!r} does not hold what its index says: {told}; fetch the model again, both "
            "the index and its files"
        )


def canonical_names(
    stored: Iterable[str], where: object, key_mapping: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Translate the names in a file.

    Args:
        stored: the names as stored.
        where: the file, for the message.
        key_mapping: as in `open_checkpoint`.

    Returns:
        The stored name by Transformers' name.

    Raises:
        CheckpointError: two stored names mean the same tensor, or a regular expression is none.

    Example:
        >>> canonical_names(["norm_f.weight"], Path("model.safetensors"))
        {'backbone.norm_f.weight': 'norm_f.weight'}
    """
    names: dict[str, str] = {}
    for name in stored:
        other = names.setdefault(to_transformers_name(_mapped(name, key_mapping)), name)
        if other != name:
            raise CheckpointError(
                f"{str(where)!r} holds one tensor under two names, {shown(other)} and "
                f"{shown(name)}; remove one"
            )
    return names


def _mapped(name: str, key_mapping: Mapping[str, str] | None) -> str:
    for pattern, replacement in (key_mapping or {}).items():
        try:
            name = re.sub(pattern, replacement, name)
        except (re.error, TypeError, IndexError) as error:
            raise CheckpointError(
                f"key_mapping has {shown(pattern)} for {shown(replacement)}, expected a regular "
                f"expression and its replacement: {error}"
            ) from error
    return name
