"""How far a long task has come, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Self, TextIO

from anymamba.cli.terminal.output import forget

BAR_WIDTH = 24
# A terminal is drawn on anew; in a file every line stays, so that they come rarely.
SECONDS_ON_TERMINAL = 0.1
SECONDS_IN_FILE = 10.0


class Line:
    """A line that is drawn over and over on a terminal, and elsewhere comes now and then.

    Args:
        out: where to draw; by default standard error.
        visible: False to draw nothing.
    """

    def __init__(self, out: TextIO | None = None, *, visible: bool = True) -> None:
        self._out = sys.stderr if out is None else out
        self._visible = visible
        self._on_terminal = self._out.isatty()
        self._pause = SECONDS_ON_TERMINAL if self._on_terminal else SECONDS_IN_FILE
        self._start = self._drawn_at = time.monotonic()
        self._drawn_width = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Leave the terminal as it was: what follows stands in the line's place."""
        if self._drawn_width:
            self._write("\r" + " " * self._drawn_width + "\r")

    def draw(self, make_line: Callable[[float], str]) -> None:
        """Draw the line, which is made of the seconds so far, unless one was drawn just now."""
        now = time.monotonic()
        if not self._visible or now - self._drawn_at < self._pause:
            return
        self._drawn_at = now
        line = make_line(now - self._start)
        if self._on_terminal:
            self._write("\r" + line.ljust(self._drawn_width))
            self._drawn_width = len(line)
        else:
            self._write(line + "\n")

    def _write(self, text: str) -> None:
        try:
            self._out.write(text)
            self._out.flush()
        except OSError:  # work is not lost if nobody can see it
            forget(self._out)
            self._visible = False

    def bar(self, share: float) -> str:
        """How full it is, in a bar where there is a terminal to draw it on."""
        full = int(share * BAR_WIDTH)
        bar = f"[{'#' * full}{'.' * (BAR_WIDTH - full)}] " if self._on_terminal else ""
        return f"{bar}{share:4.0%}"


class Progress(Line):
    """How much of a text was read, and how fast.

    Args:
        total_bytes: how much there is to read; None where nobody knows.
        out, visible: as in `Line`.

    Example:
        >>> with Progress(10, sys.stdout) as progress:
        ...     progress.show(5, 3)
        ...     progress.show(10, 6)  # within the same ten seconds
    """

    def __init__(
        self, total_bytes: int | None, out: TextIO | None = None, *, visible: bool = True
    ) -> None:
        super().__init__(out, visible=visible)
        self._total = total_bytes

    def show(self, done_bytes: int, tokens: int) -> None:
        """Say how far it is."""
        self.draw(lambda seconds: self._line(done_bytes, tokens, seconds))

    def _line(self, done_bytes: int, tokens: int, seconds: float) -> str:
        speed = f"{tokens:,} tokens, {tokens / seconds:,.0f} tokens/s"
        if not self._total:
            return f"{done_bytes / 1e6:.1f} MB, {speed}"
        share = min(done_bytes / self._total, 1.0)
        left = clock(seconds * (1 - share) / share) if share else "?"
        return f"{self.bar(share)}, {speed}, {left} left"


class Steps(Line):
    """How many steps of a known number are done.

    Args:
        name: what the steps are.
        out, visible: as in `Line`.
    """

    def __init__(self, name: str, out: TextIO | None = None, *, visible: bool = True) -> None:
        super().__init__(out, visible=visible)
        self._name = name

    def show(self, done: int, total: int) -> None:
        """Say how far it is."""
        self.draw(lambda _: f"{self.bar(done / max(total, 1))}, {done} of {total} {self._name}")


def clock(seconds: float) -> str:
    """Minutes and seconds, and hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
