"""Texts in files and on standard input, read in blocks or whole."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import BinaryIO

from anymamba.checkpoint.io import not_text, user_path
from anymamba.errors import InputError

STANDARD_INPUT = "-"
BLOCK_BYTES = 1 << 15


def read_blocks(name: str, count: Callable[[int], object] | None = None) -> Iterator[str]:
    """The text of a file in blocks, cut between characters; `-` is standard input.

    `count` is told how many bytes each block took.

    Raises:
        InputError: the file cannot be read, or is not UTF-8 text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    before, beginning = 0, b""
    with open_binary(name) as file:
        while True:
            data = read_some(file, name)
            if not before:
                beginning = data
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                # The decoder counts from the bytes that it had kept of the block before.
                at = before + len(data) - len(error.object) + error.start
                raise InputError(not_text(shown(name), beginning, at)) from None
            before += len(data)
            if count:
                count(len(data))
            if text:
                yield text
            if not data:
                return


def read_some(file: BinaryIO, name: str) -> bytes:
    """A block, or what there is of one; empty at the end."""
    try:
        return file.read(BLOCK_BYTES)
    except OSError as error:
        raise InputError(f"cannot read {shown(name)}: {error.strerror}") from None


def open_binary(name: str) -> AbstractContextManager[BinaryIO]:
    """The file, or standard input, which is left open for others."""
    if name == STANDARD_INPUT:
        if sys.stdin is None:
            raise InputError("there is no standard input to read")
        return nullcontext(sys.stdin.buffer)
    try:
        return user_path(name, InputError).open("rb")
    except OSError as error:
        raise InputError(f"cannot read {shown(name)}: {error.strerror}") from None


def read_text(name: str) -> str:
    """The whole text of a file, or of standard input."""
    return "".join(read_blocks(name))


def read_once(names: Sequence[str | None]) -> None:
    """Refuse standard input for several texts: the second would be empty."""
    if names.count(STANDARD_INPUT) > 1:
        raise InputError("standard input (-) can be read only once: give one of the texts a file")


def size_of(names: Sequence[str]) -> int | None:
    """How many bytes the files hold together; None where one is a pipe or a terminal."""
    total = 0
    for name in names:
        if name == STANDARD_INPUT:
            return None
        path = user_path(name, InputError)
        if not path.exists():
            raise InputError(f"there is no file {name!r}")
        if not path.is_file():
            return None
        total += path.stat().st_size
    return total


def shown(name: str) -> str:
    """How a message calls it."""
    return "standard input" if name == STANDARD_INPUT else repr(name)
