"""What `anymamba info FILE.gguf` says about a GGUF file."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from anymamba.cli.terminal.sizes import size
from anymamba.cli.terminal.table import table

# Texts and lists longer than this are vocabularies and licences.
LONGEST = 200


def describe(file: Path) -> dict[str, Any]:
    """The values and tensors of a GGUF file and its parts, without reading the tensors."""
    from anymamba.checkpoint.gguf.parts import read_gguf_files

    header = read_gguf_files(file)
    counts: Counter[str] = Counter()
    for record in header.tensors.values():
        counts[record.dtype] += math.prod(record.shape)
    return {
        "model": str(file),
        "layout": "gguf",
        "parameters": sum(counts.values()),
        "dtypes": dict(counts),
        "metadata": {name: shortened(value) for name, value in header.metadata.items()},
        "bytes": sum(len(data) for data in header.data.values()),
    }


def shortened(value: Any) -> Any:
    """A value as it is, or of long ones how long they are."""
    if isinstance(value, (str, list, tuple)) and len(value) > LONGEST:
        kind = "characters" if isinstance(value, str) else "values"
        return f"{len(value):,} {kind}"
    return list(value) if isinstance(value, tuple) else value


def as_text(facts: dict[str, Any]) -> str:
    """The same for people."""
    types = ", ".join(f"{name} ({count:,})" for name, count in facts["dtypes"].items())
    rows: list[tuple[str, object]] = [
        ("model", facts["model"]),
        ("layout", facts["layout"]),
        ("parameters", f"{facts['parameters']:,}"),
        ("stored as", types),
        ("size", size(facts["bytes"])),
    ]
    values = [(f"  {name}", value) for name, value in facts["metadata"].items()]
    return "\n".join([table(rows), "values", table(values)])
