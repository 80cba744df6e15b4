"""What `anymamba info STATE` says about a state file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from anymamba.cli.terminal.sizes import size
from anymamba.cli.terminal.table import table
from anymamba.errors import StateError


def describe(file: Path) -> dict[str, Any]:
    """What a state has read, and the model that it belongs to."""
    from anymamba.checkpoint import read_header, read_state_file
    from anymamba.errors import CheckpointError

    try:
        claimed = read_header(file).metadata.get("model", "null")
        model = json.loads(claimed)
    except (CheckpointError, ValueError, RecursionError) as error:
        raise StateError(f"{str(file)!r} is neither a model nor a state: {error}") from None
    if not isinstance(model, dict) or not {*SIZES} <= model.keys():
        raise StateError(f"{str(file)!r} is not a state that AnyMamba saved")
    state = read_state_file(file, model)
    return {
        "state": str(file),
        "token_counts": list(state.token_counts),
        "model": model,
        "weights_digest": state.weights_digest,
        "dtypes": {name: record.dtype for name, record in state.tensors.items()},
        "bytes": file.stat().st_size,
    }


# What a state's shapes follow from.
SIZES = ("num_hidden_layers", "intermediate_size", "state_size", "conv_kernel")


def as_text(facts: dict[str, Any]) -> str:
    """The same for people."""
    rows: list[tuple[str, object]] = [
        ("state", facts["state"]),
        ("tokens read", ", ".join(f"{count:,}" for count in facts["token_counts"])),
        ("size", size(facts["bytes"])),
        ("stored as", ", ".join(f"{name} {kind}" for name, kind in facts["dtypes"].items())),
        ("weights", facts["weights_digest"] or "unknown"),
    ]
    model = [(f"  {name}", value) for name, value in facts["model"].items()]
    return "\n".join([table(rows), "model", table(model)])
