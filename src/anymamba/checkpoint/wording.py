"""How error messages show what came out of a file: short, quoted, on one line."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable

__all__ = ["listed", "not_text", "shown"]

_MOST = 10

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def shown(value: object) -> str:
    """Show a value from a file: like repr, which escapes line ends, but never long or deep.

    Example:
        >>> shown("two\\nlines")
        "'two\\\\nlines'"
        >>> len(shown("x" * 1000))
        80
    """
    return _short.repr(value)


# How files begin that are taken for texts by mistake.
_BEGINNINGS = {
    b"\xff\xfe": "it is UTF-16: `iconv -f UTF-16 -t UTF-8` makes UTF-8 of it",
    b"\xfe\xff": "it is UTF-16: `iconv -f UTF-16 -t UTF-8` makes UTF-8 of it",
    b"\x1f\x8b": "it is compressed: unpack it first, as by gunzip",
    b"BZh": "it is compressed: unpack it first, as by bunzip2",
    b"\xfd7zXZ": "it is compressed: unpack it first, as by unxz",
    b"\x28\xb5\x2f\xfd": "it is compressed: unpack it first, as by unzstd",
    b"PK\x03\x04": "it is an archive or a document: unpack it, or export its text",
    b"%PDF": "it is a PDF: export its text",
}


def not_text(name: str, beginning: bytes, at: int) -> str:
    """The message for a file that is not UTF-8 text, and what it seems to be.

    Args:
        name: what the file is called.
        beginning: its first bytes.
        at: where it stops being text.

    Example:
        >>> print(not_text("'a.txt'", b"H\\0i\\0", 1))
        'a.txt' is not UTF-8 text: see its byte 1; it may be UTF-16 or hold no text at all
    """
    known = next((what for mark, what in _BEGINNINGS.items() if beginning.startswith(mark)), None)
    if known is None and b"\0" in beginning:
        known = "it may be UTF-16 or hold no text at all"
    return f"{name} is not UTF-8 text: see its byte {at}" + (f"; {known}" if known else "")


def listed(items: Iterable[str]) -> str:
    """Join words with commas; of a long list, the first ten and how many more there are.

    Example:
        >>> listed(["a", "b"])
        'a, b'
        >>> listed(map(str, range(13)))
        '0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 3 more'
    """
    words = list(items)
    more = f" and {len(words) - _MOST} more" if len(words) > _MOST else ""
    return ", ".join(words[:_MOST]) + more
