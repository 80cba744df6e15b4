"""Quantizing a model once: from a folder in any layout to one with weights of 8 or 4 bits.

The new folder has Transformers' config with a `quantization_config`, the source's tokenizer, and
in model.safetensors in place of each large `<module>.weight`

    <module>.weight_q        U8     (n, k) at 8 bits, (n, k / 2) at 4
    <module>.weight_scales   BF16   (n, k / group)
    <module>.weight_minima   BF16   (n, k / group), with an offset only

as `anymamba.checkpoint.quantization.format` describes them. Which matrices are large stands in
`anymamba.checkpoint.architecture`. The small ones are sensitive, and become bfloat16, as do large
ones whose rows the group does not divide. All else becomes float32.
`docs/quantization.md` has the measurements behind this.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anymamba.checkpoint import expected_shapes
from anymamba.checkpoint.architecture import is_matrix, role_of
from anymamba.checkpoint.atomic_folder import check_apart, check_destination, write_folder
from anymamba.checkpoint.dtypes import FLOATS, as_dtype, as_float32
from anymamba.checkpoint.finite import check_finite
from anymamba.checkpoint.io import listed, shown
from anymamba.checkpoint.quantization import QuantizedArray, check_format
from anymamba.checkpoint.quantized_folder import BITS, FORMAT, FORMAT_VERSION, is_quantized
from anymamba.checkpoint.safetensors import SafetensorsStream, TensorPlan
from anymamba.checkpoint.source import Source, open_source
from anymamba.checkpoint.tokenizer import read_tokenizer, tokenizer_from_json
from anymamba.errors import CheckpointError, ConfigError, InputError
from anymamba.runtime.convert.calibration import Recipe, calibrate, check_readable, windows_of
from anymamba.runtime.convert.layouts import config_of_layout
from anymamba.runtime.native import core, wanted_threads
from anymamba.runtime.tokenizer import TextCodec

Progress = Callable[[int, int], object]


def quantize_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    weights: str = "int4",
    group: int = 128,
    symmetric: bool = True,
    calibrate: str | Sequence[int] | None = None,
    *,
    search: bool = True,
    tokenizer: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    offline: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a model with weights of 8 or 4 bits, in one step: a reader sees all of it or nothing.

    Tensors are read, quantized and written one after the other. Without a text, memory holds the
    largest of them; with one, a layer and its inputs for the text.

    Args:
        source: a model's folder in any layout, a GGUF file, or a hub id.
        destination: the folder to write.
        weights: "int8" or "int4".
        group: how many weights share a scale: 32, 64 or 128.
        symmetric: whether zero lies in the middle; else each group has a minimum too.
        calibrate: some pages of the kind of text that the model is for, or their tokens: weights
            are rounded so that errors on it make up for each other. Up to 32,768 tokens, spread
            over all of it, are read. It needs the native core.
        search: whether 4-bit groups try narrower ranges, with or without a text.
        tokenizer: a folder or tokenizer.json for the text, if the model comes without one.
        threads: how many compute; None leaves the choice to the environment.
        overwrite, offline: as for `convert`.
        progress: told how many tensors are written, and how many there are.

    Returns:
        The destination, links followed.

    Raises:
        ConfigError: there are no such weights or groups, or the model cannot be calibrated.
        InputError: the text is empty, or does not fit the vocabulary.
        CheckpointError: the source is missing, broken, quantized, or holds NaN or infinity in
            what is to be quantized; the destination exists or cannot be written.
        MissingDependencyError: pickled weights need torch, a calibration the native core.

    Example:
        >>> import tempfile
        >>> import anymamba
        >>> from anymamba.assets import bundled_model
        >>> folder = quantize_checkpoint(bundled_model(), Path(tempfile.mkdtemp()) / "int4")
        >>> anymamba.load(folder).weight_type
        'int4'
    """
    recipe = _recipe(weights, group, symmetric, search, wanted_threads(threads))
    check_apart(source, destination)
    target = check_destination(destination, overwrite)
    model = open_source(source, offline)
    rounded = sorted(set(model.dtypes.values()).difference(FLOATS))
    if rounded:
        raise CheckpointError(
            f"weights in {os.fspath(source)!r} are stored as {listed(rounded)}, and would be "
            "rounded twice; quantize the model that they were made of"
        )
    windows_bl = None
    if calibrate is not None:
        core().set_threads(recipe.threads)
        windows_bl = windows_of(_tokens(calibrate, model, tokenizer))
        check_readable(windows_bl, model.config)
    write_folder(target, lambda folder: _write(folder, model, recipe, windows_bl, progress))
    return target


def _recipe(weights: str, group: int, symmetric: bool, search: bool, threads: int) -> Recipe:
    if weights not in BITS:
        raise ConfigError(f"weights must be {' or '.join(BITS)}, got {shown(weights)}")
    check_format(BITS[weights], group, group)
    return Recipe(BITS[weights], group, symmetric, search, threads)


def _tokens(
    text: str | Sequence[int], model: Source, tokenizer: str | os.PathLike[str] | None
) -> NDArray[np.int64]:
    if not isinstance(text, str):
        ids = np.asarray(text)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise InputError(f"calibrate must be text or a list of tokens, got {shown(text)}")
        return ids.astype(np.int64)
    if tokenizer is not None:
        codec = TextCodec(lambda: read_tokenizer(tokenizer))
    elif (own := model.companions.get("tokenizer.json")) is not None:
        codec = TextCodec(lambda: tokenizer_from_json(own, "the model's tokenizer.json"))
    else:
        codec = TextCodec(None)
    return np.array(codec.encode(text, special=False), np.int64)


def _write(
    folder: Path,
    model: Source,
    recipe: Recipe,
    windows_bl: NDArray[np.int64] | None,
    progress: Progress | None,
) -> None:
    config = config_of_layout(model.config, "transformers", "F32")
    config["quantization_config"] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "bits": recipe.bits,
        "group_size": recipe.group,
        "symmetric": recipe.symmetric,
        "range_search": recipe.searches,
        "calibrated": windows_bl is not None,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name, data in model.companions.items():
        (folder / name).write_bytes(data)
    shapes = expected_shapes(model.config)
    plans = _plans(shapes, recipe)
    written = 0
    with SafetensorsStream(folder / "model.safetensors", plans, {"format": "pt"}) as stream:
        for name, tensor in _tensors(model, shapes, recipe, windows_bl):
            for part, array in _parts(name, tensor).items():
                stream.put(part, np.ascontiguousarray(array).data)
            written += 1
            if progress is not None:
                progress(written, len(shapes))


def _plans(shapes: Mapping[str, tuple[int, ...]], recipe: Recipe) -> dict[str, TensorPlan]:
    """What the file will hold."""
    plans: dict[str, TensorPlan] = {}
    for name, shape in shapes.items():
        if not is_quantized(name, shape, recipe.group):
            plans[name] = TensorPlan("BF16" if is_matrix(name) else "F32", shape)
            continue
        n, k = shape
        plans[f"{name}_q"] = TensorPlan("U8", (n, k * recipe.bits // 8))
        plans[f"{name}_scales"] = TensorPlan("BF16", (n, k // recipe.group))
        if not recipe.symmetric:
            plans[f"{name}_minima"] = TensorPlan("BF16", (n, k // recipe.group))
    return plans


def _parts(name: str, tensor: NDArray[Any] | QuantizedArray) -> dict[str, NDArray[Any]]:
    if isinstance(tensor, np.ndarray):
        return {name: tensor}
    parts = {f"{name}_{part}": array for part, array in tensor.arrays().items()}
    return {part: array for part, array in parts.items() if array is not None}


def _tensors(
    model: Source,
    shapes: Mapping[str, tuple[int, ...]],
    recipe: Recipe,
    windows_bl: NDArray[np.int64] | None,
) -> Iterator[tuple[str, NDArray[Any] | QuantizedArray]]:
    """All tensors as they are to be stored, one at a time."""

    def wide(name: str) -> NDArray[np.float32] | None:
        tensor = model.tensors.get(name) if name in shapes else None
        if tensor is None:
            return None
        return as_float32(as_dtype(tensor, "BF16") if role_of(name) == "small matrix" else tensor)

    try:
        if windows_bl is not None:
            yield from calibrate(wide, model.config, windows_bl, recipe)
        for name, shape in shapes.items():
            values = wide(name)
            assert values is not None  # open_source has checked that all are there
            check_finite(name, values)
            if not is_quantized(name, shape, recipe.group):
                yield name, as_dtype(values, "BF16") if is_matrix(name) else values
            elif windows_bl is None:
                yield name, recipe.rounded(values, name)
    except InputError as error:
        raise CheckpointError(str(error)) from error
