"""What a script leaves behind: tables on the screen and a JSON file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.machine import in_one_line
from common.options import Options
from common.tables import Table, markdown

__all__ = ["finish", "read_result"]


def finish(name: str, options: Options, machine: dict[str, Any], tables: Sequence[Table]) -> None:
    """Print the tables and write them.

    Args:
        name: the script's; the file is called after it.
        options: tell where.
        machine: its description, made before measuring began.
        tables: the results.
    """
    result: dict[str, Any] = {
        "benchmark": name,
        "date": datetime.now(UTC).date().isoformat(),
        "quick": options.quick,
        "machine": machine,
        "tables": [table.as_json() for table in tables],
    }
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    smoke = " (a smoke run: the numbers mean nothing)" if options.quick else ""
    print(f"# {name}{smoke}\n\n{in_one_line(machine)}\n")
    for table in result["tables"]:
        print(markdown(table), end="\n\n")
    print(f"written to {path}\n", flush=True)


def read_result(folder: Path, name: str) -> dict[str, Any] | None:
    """A script's last result, or None where there is none."""
    path = folder / f"{name}.json"
    if not path.is_file():
        return None
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result
