"""The text to continue: from the command line, or from standard input."""

from __future__ import annotations

import sys

from anymamba.errors import InputError


def prompt_from(argument: str | None, *, needed: bool = True) -> str:
    """The prompt given as an argument, else what standard input holds, less one line end.

    Where none is needed, a terminal is not read from, and it is empty.
    """
    if argument is None:
        return "" if not needed and nothing_is_piped() else read_prompt()
    try:
        argument.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError("the prompt is not UTF-8 text") from None
    return argument


def nothing_is_piped() -> bool:
    """Whether reading standard input would wait for someone to type."""
    return sys.stdin is None or sys.stdin.isatty()


def read_prompt() -> str:
    """All of standard input, without the one line end that `echo` adds."""
    if nothing_is_piped():
        raise InputError('no prompt: give one, as in `anymamba generate "ROMEO:"`, or pipe one in')
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"the prompt on standard input is not UTF-8 text: {error}") from None
    return text.removesuffix("\r\n" if text.endswith("\r\n") else "\n")
