"""What a person types in a chat: messages of one line or several."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress

from anymamba.cli.terminal.output import tell
from anymamba.errors import InputError

ReadLine = Callable[[str], str]
"""Shows a prompt and returns the next line without its end; at the end of input an EOFError."""

PROMPT = "> "
MORE = "... "
QUOTES = '"""'


def messages(read_line: ReadLine) -> Iterator[str]:
    r"""The messages typed, without those that are empty.

    A line that ends in a backslash goes on in the next one. A message that begins with three
    quotes goes on to the next three quotes at the end of a line.

    Example:
        >>> lines = iter(['one', 'two \\', 'lines', '\"\"\"and', '', 'more\"\"\"'])
        >>> def read_line(prompt):
        ...     try:
        ...         return next(lines)
        ...     except StopIteration:
        ...         raise EOFError from None
        >>> list(messages(read_line))
        ['one', 'two \nlines', 'and\n\nmore']
    """
    while True:
        try:
            message = read_message(read_line)
        except EOFError:
            return
        if message.strip():
            yield message


def read_message(read_line: ReadLine) -> str:
    """The next message. One that the end of input cuts short counts as it is."""
    line = read_line(PROMPT)
    if line.startswith(QUOTES):
        return read_quoted(line.removeprefix(QUOTES), read_line)
    lines = [line]
    with suppress(EOFError):
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1].removesuffix("\\")
            lines.append(read_line(MORE))
    return "\n".join(lines)


def read_quoted(line: str, read_line: ReadLine) -> str:
    """The rest of a message in quotes."""
    lines = [line]
    with suppress(EOFError):
        while not lines[-1].endswith(QUOTES):
            lines.append(read_line(MORE))
    return "\n".join(lines).removesuffix(QUOTES)


def line_reader(history: str | None) -> ReadLine:
    """Reads lines from the terminal, with its editing and history, or from a pipe.

    A file of that name keeps the history.
    """
    if sys.stdin is None:
        raise InputError("there is no standard input to read")
    if not sys.stdin.isatty():
        return read_piped_line
    try:
        import readline
    except ImportError:  # Windows has none; its terminal edits lines by itself
        return read_typed_line
    if history is not None:
        remember(readline, history)
    return read_typed_line


def remember(readline: object, history: str) -> None:
    """Bring back the lines of earlier chats, and keep those of this one at its end."""
    import atexit
    from typing import Any, cast

    from anymamba.checkpoint.io import user_path

    lines = cast(Any, readline)
    path = user_path(history, InputError)
    try:
        if path.exists() and path.stat().st_size > 0:  # libedit, on macOS, refuses an empty one
            lines.read_history_file(path)
        else:
            path.touch(mode=0o600)
    except OSError as error:
        raise InputError(f"cannot keep the history in {history!r}: {error.strerror}") from None
    lines.set_history_length(1000)

    def keep() -> None:
        try:
            lines.write_history_file(path)
        except OSError as error:
            tell(f"anymamba: the history could not be kept in {history!r}: {error.strerror}")

    atexit.register(keep)


def read_typed_line(prompt: str) -> str:
    """The next line of the terminal."""
    try:
        line = input(prompt)
        line.encode("utf-8")  # in some settings Python keeps bytes that are no text
    except UnicodeError:
        raise InputError("what was typed is not UTF-8 text") from None
    return line


def read_piped_line(prompt: str) -> str:
    """The next line of standard input; nobody is there to see a prompt."""
    data = sys.stdin.buffer.readline()
    if not data:
        raise EOFError
    try:
        return data.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8 text: {error}") from None
