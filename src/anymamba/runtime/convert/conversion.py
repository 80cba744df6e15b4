"""Writing a model in another layout, another type of weights, or as a GGUF file.

Values change only where another type is asked for, or where GGUF has another form, see
`anymamba.checkpoint.gguf.reader`. The embedding table, the head and the projections take the type;
norms, the convolution, A, D and biases keep theirs, unless it is to be float32 all over. One tensor
at a time is in memory, but of a pickled model.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from anymamba.checkpoint import Layout, expected_shapes, model_shape
from anymamba.checkpoint.architecture import EMBEDDINGS, HEAD, is_matrix, special_token
from anymamba.checkpoint.atomic_folder import check_apart, check_destination, write_folder
from anymamba.checkpoint.dtypes import as_dtype, as_float32, check_fits_float16, dtype_of
from anymamba.checkpoint.finite import check_finite
from anymamba.checkpoint.gguf import is_gguf
from anymamba.checkpoint.gguf.writer import GGUF_WEIGHTS, write_gguf
from anymamba.checkpoint.io import parse_json_object
from anymamba.checkpoint.safetensors import SafetensorsStream, TensorPlan
from anymamba.checkpoint.source import Source, open_source
from anymamba.errors import ConfigError
from anymamba.runtime.convert.layouts import config_of_layout, name_in_layout, repeats_head

LAYOUTS = (*get_args(Layout), "gguf")
"""What can be written."""

FOLDER_WEIGHTS = ("f32", "f16", "bf16")
"""The types that matrices in a folder can have. `anymamba quantize` writes those with less bits."""


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    layout: str = "transformers",
    weights: str | None = None,
    *,
    overwrite: bool = False,
    offline: bool = False,
) -> Path:
    """Write a model in another form, in one step: a reader sees all of it or nothing.

    Args:
        source: a model's folder in any layout, a GGUF file, or a hub id. Pickled weights need
            the extra `torch`; nothing in them is run.
        destination: the folder to write; for the layout "gguf", the file.
        layout: "transformers", "original", "minimal" or "gguf". Folders hold safetensors, and the
            tokenizer's and generation's files of the source.
        weights: the matrices' type, one of `FOLDER_WEIGHTS`, for a GGUF file of `GGUF_WEIGHTS`.
            By default as they are stored; what is stored in 8 or 4 bits becomes float32 in a
            folder, which is exact.
        overwrite: replace a model that is there. A folder that holds other files is refused.
        offline: use what was downloaded of a hub id before, and no network.

    Returns:
        The destination, links followed.

    Raises:
        ConfigError: there is no such layout or type, or the layout cannot express the model.
        CheckpointError: the source is missing or broken, or the destination exists or cannot be
            written.
        MissingDependencyError: pickled weights need torch, a GGUF file the `gguf` package.

    Example:
        >>> import tempfile
        >>> from anymamba.assets import bundled_model
        >>> folder = convert(bundled_model(), Path(tempfile.mkdtemp()) / "model", "original", "f32")
        >>> sorted(path.name for path in folder.iterdir())[:2]
        ['config.json', 'generation_config.json']
    """
    _check_choice(layout, weights, destination)
    check_apart(source, destination)
    target = check_destination(destination, overwrite, file=layout == "gguf")
    model = open_source(source, offline)
    if layout == "gguf":
        _write_gguf(target, model, weights)
        return target
    # Whatever the layout cannot express shows before anything is written.
    config_of_layout(model.config, layout, "F32")  # type: ignore[arg-type]
    write_folder(target, lambda folder: write_files(folder, model, layout, weights))
    return target


def _check_choice(layout: str, weights: str | None, destination: str | os.PathLike[str]) -> None:
    if layout not in LAYOUTS:
        raise ConfigError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if (layout == "gguf") != is_gguf(destination):
        wanted = "a GGUF file, whose name ends" if layout == "gguf" else "a folder, not a file"
        raise ConfigError(
            f"the layout {layout!r} is {wanted} in .gguf, got {os.fspath(destination)!r}"
        )
    known = GGUF_WEIGHTS if layout == "gguf" else FOLDER_WEIGHTS
    if weights is not None and weights not in known:
        other = "" if layout == "gguf" else "; `anymamba quantize` writes int8 and int4"
        raise ConfigError(
            f"weights of the layout {layout!r} must be one of {', '.join(known)}, got "
            f"{weights!r}{other}"
        )


def _write_gguf(target: Path, model: Source, weights: str | None) -> None:
    by_type = {"F64": "f32"} | {name.upper(): name for name in GGUF_WEIGHTS}
    if weights is None and model.dtype not in by_type:
        raise ConfigError(
            f"the model is stored in {model.dtype}, which is read here and not written; say in "
            f"which type to write it: weights=... (--weights), one of {', '.join(GGUF_WEIGHTS)}"
        )
    write_gguf(
        target,
        {**model.config, **_special_tokens(model)},
        model.tensors,
        weights or by_type[model.dtype],
        model.text("tokenizer.json"),
        model.chat_template(),
    )


def _special_tokens(model: Source) -> dict[str, Any]:
    """The tokens that begin, end and fill texts, where Transformers looks for them."""
    file = "generation_config.json"
    data = model.companions.get(file)
    generation = {} if data is None else parse_json_object(data, file)
    found = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = generation.get(name, special_token(model.config, name))
        found[name] = value[0] if isinstance(value, list) and value else value
    return found


def write_files(folder: Path, model: Source, layout: Any, weights: str | None) -> None:
    """Fill a folder with a model: config, weights, and the other files that belong to it.

    Args:
        folder: an empty one.
        model: what is written, a tensor at a time.
        layout: one of `LAYOUTS` but "gguf".
        weights: the matrices' type, one of `FOLDER_WEIGHTS`, or None to keep it.

    Raises:
        ConfigError: the layout cannot express the model, or the type its numbers.
        CheckpointError: the model's files are broken.

    Example:
        >>> import tempfile
        >>> from anymamba.assets import bundled_model
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_files(folder, open_source(bundled_model()), "transformers", None)
        >>> (folder / "model.safetensors").is_file()
        True
    """
    shapes = expected_shapes(model.config)
    plans = {
        name: TensorPlan(_written_dtype(name, model.dtypes[name], weights), shape)
        for name, shape in shapes.items()
    }
    repeated = model_shape(model.config).tied and repeats_head(layout)
    if repeated:
        plans[HEAD] = plans[EMBEDDINGS]
    config = config_of_layout(model.config, layout, plans[EMBEDDINGS].dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name, data in model.companions.items():
        (folder / name).write_bytes(data)
    named = {name_in_layout(name, layout): plan for name, plan in plans.items()}
    with SafetensorsStream(folder / "model.safetensors", named, {"format": "pt"}) as stream:
        for name in shapes:
            tensor = model.tensors[name]
            check_finite(name, tensor)
            written = np.ascontiguousarray(_typed(name, tensor, plans[name].dtype)).data
            stream.put(name_in_layout(name, layout), written)
            if repeated and name == EMBEDDINGS:
                stream.put(name_in_layout(HEAD, layout), written)


def _written_dtype(name: str, stored: str, weights: str | None) -> str:
    """The type that a tensor is to be written in; its own, where nothing else is asked for."""
    own = stored if stored in ("F16", "BF16") else "F32"
    return own if weights is None or (weights != "f32" and not is_matrix(name)) else weights.upper()


def _typed(name: str, tensor: NDArray[Any], dtype: str) -> NDArray[Any]:
    """A tensor in such a type, where it lies if it has that type."""
    if dtype_of(tensor) == dtype:
        return tensor
    wide = as_float32(tensor)
    if dtype == "F16":
        check_fits_float16(name, wide)
    return as_dtype(wide, dtype)
