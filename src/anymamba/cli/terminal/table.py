"""Names and values in two columns, and numbers in many."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[tuple[str, object]]) -> str:
    """One line a row, the values below one another."""
    lines = [(name, str(value).replace("\n", "\\n")) for name, value in rows]
    width = max((len(name) for name, _ in lines), default=0)
    return "\n".join(f"{name:{width}}  {value}".rstrip() for name, value in lines)


def columns(rows: Sequence[Sequence[str]]) -> str:
    """A table: the first column at its left, the others, which are numbers, at their right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
