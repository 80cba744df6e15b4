"""A LoRA or DoRA adapter's files, as PEFT writes them, read and checked without torch or PEFT.

An adapter is a folder with adapter_config.json and adapter_model.safetensors. Files come from
strangers: every shape is compared with the model's, and a setting that would change what merging
means is refused by name rather than left aside.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anymamba.checkpoint import bytes_digest, to_transformers_name
from anymamba.checkpoint.architecture import MAMBA
from anymamba.checkpoint.dtypes import as_float32
from anymamba.checkpoint.files import ADAPTER_NAMES
from anymamba.checkpoint.finite import check_finite
from anymamba.checkpoint.io import listed, read_json_object, shown, user_path
from anymamba.checkpoint.safetensors.mmap import FileMap
from anymamba.errors import CheckpointError

CONFIG_FILE, WEIGHTS_FILE = ADAPTER_NAMES

_PREFIX = "base_model.model."
_ENDINGS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",  # as PEFT wrote it before version 0.10
}
_TABLES = ("embeddings", "embedding")  # Transformers' name, and the authors'

# Settings that are read below, and those that change nothing once training is over.
_KNOWN = {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
    *("peft_version", "peft_type", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "lora_dropout", "fan_in_fan_out", "megatron_core", "qalora_group_size"),
    *("loftq_config", "runtime_config", "eva_config"),
}
# Settings of which some values are merged. Of the ways to begin these leave the model's own weights
# as they are; others move part of them away.
_FITTING = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "eva")}


@dataclass(frozen=True)
class Change:
    """What an adapter does to one matrix W (n, k): it becomes W + scaling * B A.

    Args:
        A: (r, k), float32.
        B: (n, r), float32.
        scaling: the factor.
        magnitude: of DoRA, the lengths that the sum's rows are brought to (n,), and of the
            embedding table its columns (k,).
        transposed: of the embedding table, which PEFT takes as (k, n): A is then (r, n), B (k, r).
    """

    A: NDArray[np.float32]
    B: NDArray[np.float32]
    scaling: float
    magnitude: NDArray[np.float32] | None = None
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix that it fits."""
        n, k = self.B.shape[0], self.A.shape[1]
        return (k, n) if self.transposed else (n, k)


@dataclass(frozen=True)
class Adapter:
    """An adapter, read.

    Args:
        folder: where it lies.
        changes: by Transformers' name of the weight that each of them changes.
        digest: tells which adapter it is: from its weights and what they are scaled by.
    """

    folder: Path
    changes: Mapping[str, Change]
    digest: str


def base_model_of(folder: str | os.PathLike[str]) -> str | None:
    """The model that an adapter names as the one it was trained on, if it names one.

    Raises:
        CheckpointError: it is no adapter.

    Example:
        >>> import json, tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> fields = {"peft_type": "LORA", "base_model_name_or_path": "state-spaces/mamba-130m-hf"}
        >>> _ = (folder / "adapter_config.json").write_text(json.dumps(fields))
        >>> base_model_of(folder)
        'state-spaces/mamba-130m-hf'
    """
    named = read_json_object(_folder(folder) / CONFIG_FILE).get("base_model_name_or_path")
    return named if isinstance(named, str) and named else None


def read_adapter(folder: str | os.PathLike[str]) -> Adapter:
    """Read an adapter of PEFT's: LoRA, DoRA, either with rank-stabilized scaling.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.

    Returns:
        What it changes, as float32. Whether that fits a model is not asked here.

    Raises:
        CheckpointError: files are missing, broken or pickled; or the adapter is of another kind,
            or has a setting that is not merged here. The message names it.

    Example:
        >>> import json, tempfile
        >>> from safetensors.numpy import save_file
        >>> folder = Path(tempfile.mkdtemp())
        >>> fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 8}
        >>> _ = (folder / "adapter_config.json").write_text(json.dumps(fields))
        >>> name = "base_model.model.backbone.layers.0.mixer.out_proj.lora_"
        >>> A, B = np.ones((2, 6), np.float32), np.ones((3, 2), np.float32)
        >>> save_file({f"{name}A.weight": A, f"{name}B.weight": B}, folder / WEIGHTS_FILE)
        >>> (name, change), = read_adapter(folder).changes.items()
        >>> name, change.shape, change.scaling
        ('backbone.layers.0.mixer.out_proj.weight', (3, 6), 4.0)
    """
    place = _folder(folder)
    settings = read_json_object(place / CONFIG_FILE)
    where = repr(str(place / CONFIG_FILE))
    _refuse_other_adapters(settings, where)
    parts, digest = _read_parts(place)
    changes = {}
    for module, found in parts.items():
        name = to_transformers_name(f"{module}.weight")
        if name in changes:
            raise CheckpointError(f"{str(place)!r} has two adapters of {name}, expected one")
        changes[name] = _change(module, found, settings, str(place))
    if not changes:
        raise CheckpointError(f"{str(place / WEIGHTS_FILE)!r} holds no adapter: it has no tensors")
    scalings = [f"{name} {change.scaling!r}" for name, change in sorted(changes.items())]
    return Adapter(place, changes, "\n".join([digest, *scalings]))


def _folder(folder: str | os.PathLike[str]) -> Path:
    place = user_path(folder)
    if not place.is_dir():
        raise CheckpointError(
            f"there is no adapter in {str(place)!r}: expected a folder with {CONFIG_FILE} and "
            f"{WEIGHTS_FILE}"
        )
    return place


# The settings.


def _refuse_other_adapters(settings: Mapping[str, Any], where: str) -> None:
    peft_type = settings.get("peft_type")
    if peft_type != "LORA":
        raise CheckpointError(
            f"{where} has peft_type {shown(peft_type)}, expected 'LORA' (with or without DoRA); "
            "merge other adapters with PEFT's merge_and_unload, and use the model that it gives"
        )
    for name, value in settings.items():
        # None, False, 0, and what is empty ask for nothing.
        merges = value in _FITTING[name] if name in _FITTING else name in _KNOWN or not value
        if not merges:
            raise CheckpointError(
                f"{where} has {shown(name)[1:-1]} {shown(value)}, which is not merged here; merge "
                "the adapter with PEFT's merge_and_unload, and use the model that it gives"
            )


def _setting(settings: Mapping[str, Any], module: str, name: str, pattern: str) -> float:
    """A number that a pattern may set for some modules: the first that fits counts, as in PEFT."""
    patterns = settings.get(pattern) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{pattern} must be an object, got {shown(patterns)}")
    value = settings.get(name, 8)  # PEFT's own default of both
    for key, number in patterns.items():
        plain = key.replace("\\.", ".")
        # A regular expression of a stranger's can take forever: plain ends of names do.
        if not re.fullmatch(r"\^?[\w.]+", plain):
            raise CheckpointError(
                f"{pattern} has the regular expression {shown(key)}, expected a module's name or "
                "the end of one; merge the adapter with PEFT's merge_and_unload"
            )
        if module == plain.removeprefix("^") or module.endswith("." + plain):
            value = number
            break
    try:
        number = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:  # JSON has whole numbers of any size
        number = math.inf
    if not math.isfinite(number):
        raise CheckpointError(f"{name} of {module} must be a number, got {shown(value)}")
    return number


def _switch(settings: Mapping[str, Any], name: str) -> bool:
    value = settings.get(name)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{name} must be true or false, got {shown(value)}")
    return bool(value)


# The weights.


def _read_parts(folder: Path) -> tuple[dict[str, dict[str, NDArray[np.float32]]], str]:
    """Each module's tensors as float32, and the digest of all as they are stored."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        reason = "is pickled; save it again with PEFT, which writes" if pickled else "lacks"
        raise CheckpointError(f"the adapter in {str(folder)!r} {reason} {WEIGHTS_FILE}")
    files = FileMap()
    parts: dict[str, dict[str, NDArray[np.float32]]] = {}
    stored = files.header(path).tensors
    for name, record in stored.items():
        module, part = _module_and_part(name, path)
        if record.dtype not in ("F32", "F16", "BF16"):
            raise CheckpointError(
                f"tensor {shown(name)} in {str(path)!r} is stored as {record.dtype}, expected F32, "
                "F16 or BF16"
            )
        array = files.array(record)
        check_finite(name, array)
        found = parts.setdefault(module, {})
        if part in found:
            raise CheckpointError(f"{str(path)!r} has the {part} of {shown(module)} twice")
        found[part] = as_float32(array, copy=True)
    digest = bytes_digest({n: (r.dtype, r.shape, files.bytes_of(r)) for n, r in stored.items()})
    return parts, digest


def _module_and_part(name: str, path: Path) -> tuple[str, str]:
    ending = next((ending for ending in _ENDINGS if name.endswith(ending)), None)
    module = name.removeprefix(_PREFIX).removesuffix(ending or "")
    if ending is None or not name.startswith(_PREFIX):
        raise CheckpointError(
            f"{str(path)!r} holds {shown(name)}, which is no part of a LoRA or DoRA adapter of a "
            "causal language model; merge it with PEFT's merge_and_unload"
        )
    last = module.rpartition(".")[2]
    if last not in (*_TABLES, *MAMBA.adapted()):
        raise CheckpointError(
            f"{str(path)!r} adapts {shown(module)}, expected {listed(MAMBA.adapted())}; "
            "merge the adapter with PEFT's merge_and_unload"
        )
    is_factor = _ENDINGS[ending] != "magnitude"
    if is_factor and (last in _TABLES) != ("embedding" in ending):
        raise CheckpointError(f"{str(path)!r} has {shown(name)}, of another kind of module")
    return module, _ENDINGS[ending]


def _change(
    module: str, parts: Mapping[str, NDArray[np.float32]], settings: Mapping[str, Any], where: str
) -> Change:
    _check_parts(module, parts, _switch(settings, "use_dora"), where)
    rank, transposed = parts["A"].shape[0], module.endswith(_TABLES)
    if rank != _setting(settings, module, "r", "rank_pattern"):
        raise CheckpointError(
            f"the adapter of {shown(module)} in {where!r} has rank {rank}, which is not what its "
            f"{CONFIG_FILE} says"
        )
    alpha = _setting(settings, module, "lora_alpha", "alpha_pattern")
    scaling = alpha / (math.sqrt(rank) if _switch(settings, "use_rslora") else rank)
    return Change(parts["A"], parts["B"], scaling, parts.get("magnitude"), transposed)


def _check_parts(
    module: str, parts: Mapping[str, NDArray[np.float32]], dora: bool, where: str
) -> None:
    named = f"the adapter of {shown(module)} in {where!r}"
    expected = ["A", "B", "magnitude"] if dora else ["A", "B"]
    if parts.keys() != set(expected):
        found = listed(sorted(parts)) or "nothing"
        raise CheckpointError(f"{named} has {found}, expected {listed(expected)}")
    A, B = parts["A"], parts["B"]
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or 0 in (*A.shape, *B.shape):
        raise CheckpointError(
            f"{named} has A of shape {A.shape} and B of shape {B.shape}, expected (r, k) and (n, r)"
        )
    # One length a row of B A; of the embedding table these are its columns.
    if dora and parts["magnitude"].shape != (B.shape[0],):
        raise CheckpointError(
            f"{named} has a magnitude of shape {parts['magnitude'].shape}, expected {B.shape[:1]}"
        )
