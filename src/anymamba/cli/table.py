"""Names and values in two columns."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["table"]


def table(rows: Sequence[tuple[str, object]]) -> str:
    """One line a row, the values below one another."""
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:{width}}  {value}".rstrip() for name, value in rows)
