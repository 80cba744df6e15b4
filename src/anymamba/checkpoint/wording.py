"""How error messages show what came out of a file: short, quoted, on one line."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable

__all__ = ["listed", "shown"]

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
