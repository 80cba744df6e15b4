"""How messages show what came out of a file: short, on one line, without control characters."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable

_MOST = 10

# All that a terminal may obey or that hides what stands beside it: control characters and marks of
# direction. A line end and a tab stay.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")

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


def escaped(text: str, most: int | None = None) -> str:
    """A text as a terminal may show it: with control characters as Python writes them.

    Args:
        text: any text. Line ends and tabs stay as they are.
        most: how many characters are shown; of a longer text the beginning, and how long it is.

    Example:
        >>> escaped("a\\x1b[31m")
        'a\\\\x1b[31m'
        >>> escaped("x" * 50, most=3)
        'xxx... (50 characters)'
    """
    if most is not None and len(text) > most:
        text = f"{text[:most]}... ({len(text)} characters)"
    return _UNSAFE.sub(lambda found: repr(found[0])[1:-1], text)


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
    """The message for a file that is not UTF-8 text, and what it seems to be by its first bytes.

    `at` is where it stops being text.

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
