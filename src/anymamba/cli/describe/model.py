"""What `anymamba info MODEL` says about a model. Needs no PyTorch and loads no weights."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anymamba.checkpoint.dtypes import DTYPES, FLOATS
from anymamba.cli.terminal.sizes import size
from anymamba.cli.terminal.table import table

if TYPE_CHECKING:
    from anymamba.checkpoint import Checkpoint, ModelShape


def describe(model: str, *, offline: bool = False) -> dict[str, Any]:
    """The architecture, the sizes and the files of a model in a folder or on the hub."""
    from anymamba.checkpoint import (
        check_tensors,
        expected_shapes,
        model_shape,
        open_checkpoint,
        resolve,
    )
    from anymamba.checkpoint.architecture import architecture_of
    from anymamba.checkpoint.quantized_folder import quantized_bits, quantized_shapes

    checkpoint = open_checkpoint(resolve(model, offline=offline))
    shape = model_shape(checkpoint.config)
    expected = expected_shapes(checkpoint.config)
    bits = quantized_bits(checkpoint.config)
    if not checkpoint.pickled:  # of a pickle the shapes are not known
        found = {name: record.shape for name, record in checkpoint.tensors.items()}
        stored = quantized_shapes(checkpoint.config, found) if bits else expected
        check_tensors(found, stored, checkpoint.folder)
    return {
        "model": model,
        "folder": str(checkpoint.folder),
        "layout": checkpoint.layout,
        "model_type": architecture_of(checkpoint.config).name,
        "architecture": shape.fields,
        "parameters": sum(math.prod(dimensions) for dimensions in expected.values()),
        "quantization": checkpoint.config["quantization_config"] if bits else None,
        "dtypes": stored_types(checkpoint),
        "state_bytes": state_bytes(shape, checkpoint),
        "files": files(checkpoint.folder),
    }


def stored_types(checkpoint: Checkpoint) -> dict[str, int]:
    """How many numbers are stored in each type; empty where only loading would tell."""
    counts: Counter[str] = Counter()
    for record in checkpoint.tensors.values():
        counts[record.dtype] += math.prod(record.shape)
    return dict(counts)


def state_bytes(shape: ModelShape, checkpoint: Checkpoint) -> dict[str, int]:
    """What the memory of one sequence takes, however long it is.

    The convolution's window has the type that most weights have, unless these are quantized; the
    state is float32 always.
    """
    types = stored_types(checkpoint)
    commonest = max(types, key=types.__getitem__) if types else "F32"
    channels = shape.n_layer * shape.d_inner
    window = channels * shape.d_conv * DTYPES[commonest if commonest in FLOATS else "F32"].nbytes
    state = channels * shape.d_state * DTYPES["F32"].nbytes
    return {"conv_states": window, "ssm_states": state, "total": window + state}


def files(folder: Path) -> list[dict[str, Any]]:
    """The folder's files and their sizes in bytes."""
    found = sorted(path for path in folder.iterdir() if path.is_file())
    return [{"name": path.name, "bytes": path.stat().st_size} for path in found]


def quantization_in_words(fields: dict[str, Any] | None) -> str:
    """How the large weights are stored."""
    if fields is None:
        return "no"
    kind = "symmetric" if fields.get("symmetric", True) else "with an offset"
    return f"{fields['bits']} bits in groups of {fields.get('group_size', '?')}, {kind}"


def as_text(facts: dict[str, Any]) -> str:
    """The same for people."""
    types = ", ".join(f"{name} ({count:,})" for name, count in facts["dtypes"].items())
    state = facts["state_bytes"]
    rows: list[tuple[str, object]] = [
        ("model", facts["model"]),
        ("folder", facts["folder"]),
        ("layout", facts["layout"]),
        ("model type", facts["model_type"]),
        ("parameters", f"{facts['parameters']:,}"),
        ("stored as", types or "a pickle, which does not tell before it is loaded"),
        ("quantized", quantization_in_words(facts["quantization"])),
        (
            "state",
            f"{size(state['total'])} a sequence, at any length (convolution windows "
            f"{size(state['conv_states'])}, states {size(state['ssm_states'])})",
        ),
    ]
    parts = [table(rows), "architecture"]
    parts.append(table([(f"  {name}", value) for name, value in facts["architecture"].items()]))
    parts.append("files")
    parts.append(table([(f"  {file['name']}", size(file["bytes"])) for file in facts["files"]]))
    return "\n".join(parts)
