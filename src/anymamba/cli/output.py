"""Writing text while it is made."""

from __future__ import annotations

import sys

__all__ = ["Output", "ignore", "write"]


def write(text: str) -> None:
    """Write to standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def ignore(text: str) -> None:
    """Write nothing."""


class Output:
    """A text on standard output, shown piece by piece.

    Used as a context, it ends the last line, after Ctrl-C too.

    Args:
        beginning: what is shown before the first piece.
        visible: False to show nothing at all.
    """

    def __init__(self, beginning: str, *, visible: bool) -> None:
        self._beginning = beginning
        self._visible = visible
        self._begun = False
        self._last = ""

    def begin(self) -> None:
        """Say that pieces come now. A mistake that is found before leaves the output empty."""
        self._begun = True
        self.write(self._beginning)

    def write(self, text: str) -> None:
        """Show a piece."""
        if self._visible and text:
            write(text)
            self._last = text[-1]

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._begun and self._last != "\n":
            self.write("\n")
