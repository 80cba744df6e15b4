"""Sizes of files, counted and in words."""

from __future__ import annotations

from pathlib import Path


def bytes_in(place: Path) -> int:
    """The bytes of a file, or of all files in a folder."""
    if place.is_file():
        return place.stat().st_size
    return sum(path.stat().st_size for path in place.rglob("*") if path.is_file())


def size(count: int) -> str:
    """A number of bytes in the unit that fits."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"
