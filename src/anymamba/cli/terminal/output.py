"""Writing text while it is made, and reports and remarks beside it.

Text that comes out of files (names of tensors, values of a header, what a template says) may hold
control characters, which a terminal obeys. All output goes through here, and none of them passes.
"""

from __future__ import annotations

import json
import math
import os
import sys
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

from anymamba.checkpoint.io import escaped

# Of an error's message. What a file adds to it is short, unless it is hostile.
MOST_OF_ERROR = 4000


def prepare(stream: TextIOWrapper) -> None:
    """Let any text be written to standard output.

    A terminal that lacks a character shows a question mark, which is better than ending. A file or
    a pipe gets UTF-8 and plain line ends on all systems, as commands read them, whatever code page
    Windows has; unless `PYTHONIOENCODING` asks for another.
    """
    if stream.isatty() or os.environ.get("PYTHONIOENCODING"):
        stream.reconfigure(errors="replace")
    else:
        stream.reconfigure(encoding="utf-8", errors="replace", newline="\n")


def write(text: str) -> None:
    """Write a model's text to standard output at once.

    A terminal gets it with control characters escaped, a file or a pipe as it is.
    """
    sys.stdout.write(escaped(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def say(text: object) -> None:
    """Print a report on standard output, with control characters escaped wherever it goes."""
    print(escaped(str(text)))


def finite(value: Any) -> Any:
    """A value for JSON, which has no word for NaN and infinity: None, which becomes null."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {name: finite(part) for name, part in value.items()}
        case list() | tuple():
            return [finite(part) for part in value]
    return value


def json_line(facts: dict[str, Any]) -> str:
    """A report for programs."""
    return json.dumps(finite(facts), allow_nan=False)


def tell(line: str) -> None:
    """Say on standard error something that is no output. Work is not lost if nobody can hear it."""
    try:
        print(escaped(line), file=sys.stderr, flush=True)
    except OSError:
        forget(sys.stderr)


def tell_error(error: Exception) -> None:
    """Say on standard error what went wrong: one line, however long the message is."""
    tell("anymamba: " + escaped(" ".join(str(error).split()), MOST_OF_ERROR))


def forget(stream: TextIO) -> None:
    """Send what is still to be flushed nowhere: Python would complain about it on its way out."""
    with suppress(OSError):  # it has no file below
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def open_missing() -> None:
    """Let output that was closed before the program began (`>&-`) go nowhere.

    Python has None in its place, which `print` takes for standard output. The next file opened
    would take its number, and what libraries print would end up in that.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115


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
