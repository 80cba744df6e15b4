"""Passages whose last word is to be predicted, in JSON lines as LAMBADA's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from anymamba.cli.text.files import check_text
from anymamba.errors import InputError


@dataclass(frozen=True)
class Passage:
    """A text up to its last word, and that word with the space before it."""

    context: str
    last_word: str


def passages_in(blocks: Iterable[str], name: str) -> Iterator[Passage]:
    """The passages of a file.

    Args:
        blocks: its text; each line a JSON object with a `text` of at least two words.
        name: what messages call the file.

    Raises:
        InputError: a line is something else. The message names it.

    Example:
        >>> list(passages_in(['{"text": "to be"}'], "a.jsonl"))
        [Passage(context='to', last_word=' be')]
    """
    for number, line in enumerate(lines_of(blocks), start=1):
        if not line.strip():
            continue
        text = text_of(line, f"line {number} of {name!r}")
        context, space, word = text.rpartition(" ")
        if not context.strip() or not word:
            raise InputError(f"line {number} of {name!r} has no two words with a space between")
        yield Passage(context, space + word)


def text_of(line: str, where: str) -> str:
    """The `text` of a line's object, without white space at its ends."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {error}") from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise InputError(f'{where} is no object with a "text"')
    check_text(text, where)
    return text.strip()


def lines_of(blocks: Iterable[str]) -> Iterator[str]:
    """The lines of a text that comes in blocks."""
    rest = ""
    for number, block in enumerate(blocks):
        if number == 0:  # some editors mark a file as UTF-8
            block = block.removeprefix("\N{BYTE ORDER MARK}")
        *lines, rest = (rest + block).split("\n")
        yield from lines
    yield rest
