"""Tables that are printed, written as JSON, and read back from there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from common.timing import Timing

__all__ = ["Column", "Row", "Table", "markdown", "not_measured", "timed"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """One column: the key in the rows, what stands above it, and how its values are printed."""

    key: str
    heading: str
    format: str = "{}"


NAME = Column("name", "")
MILLISECONDS = Column("ms", "ms", "{:.4g}")
SPREAD = Column("spread", "min..max")
SPEED = Column("tokens_per_second", "tokens/s", "{:.4g}")
SHARE = Column("share_of_limit", "of the limit", "{:.2f}")
NOTE = Column("note", "")


@dataclass
class Table:
    """Rows under a title. `as_json` holds all that `markdown` needs."""

    title: str
    columns: Sequence[Column] = (NAME, MILLISECONDS, SPREAD, SPEED, SHARE, NOTE)
    rows: list[Row] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Plain lists and dicts."""
        return {
            "title": self.title,
            "columns": [vars(column) for column in self.columns],
            "rows": self.rows,
        }


def timed(
    name: str,
    timing: Timing,
    tokens: int | None = None,
    limit: Timing | None = None,
    note: str = "",
) -> Row:
    """A row of a measured case.

    Args:
        name: of the row.
        timing: what was measured.
        tokens: how many tokens one run reads, for the speed.
        limit: what the share is of.
        note: printed at the end of the row.
    """
    values = timing.seconds.values()
    milliseconds = [1e3 * value for value in (min(values), max(values))]
    return {
        "name": name,
        "ms": 1e3 * timing.median,
        "spread": "{:.4g}..{:.4g}".format(*milliseconds),
        "tokens_per_second": None if tokens is None else tokens / timing.median,
        "share_of_limit": None if limit is None else timing.speed_beside(limit),
        "rounds": len(timing.seconds),
        "note": note,
    }


def not_measured(name: str, reason: str) -> Row:
    """A row that says why it is empty."""
    return {"name": name, "note": reason}


def markdown(table: Mapping[str, Any]) -> str:
    """A table, as `Table.as_json` returns it, in aligned Markdown; columns without values go."""
    columns = [
        column
        for column in table["columns"]
        if any(row.get(column["key"]) not in (None, "") for row in table["rows"])
    ]
    lines = [[column["heading"] for column in columns]]
    lines += [[_cell(column, row) for column in columns] for row in table["rows"]]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(columns))]
    # Words stand on the left, numbers on the right.
    marks = [
        "-" * width if _is_text(column) else "-" * (width - 1) + ":"
        for column, width in zip(columns, widths, strict=True)
    ]
    lines.insert(1, marks)
    padded = [
        [
            cell.ljust(width) if _is_text(column) else cell.rjust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        ]
        for line in lines
    ]
    body = "\n".join(f"| {' | '.join(line)} |" for line in padded)
    return f"**{table['title']}**\n\n{body}"


def _is_text(column: Mapping[str, str]) -> bool:
    return column["key"] in ("name", "note")


def _cell(column: Mapping[str, str], row: Row) -> str:
    value = row.get(column["key"])
    return "" if value is None else column["format"].format(value)
