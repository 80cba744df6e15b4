"""Passages whose last word is to be predicted, in JSON lines as LAMBADA's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from anymamba.checkpoint.io import parse_json_lines
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
    for record, where in parse_json_lines(blocks, repr(name)):
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise InputError(f'{where} is no object with a "text"')
        context, space, word = text.strip().rpartition(" ")
        if not context.strip() or not word:
            raise InputError(f"{where} has no two words with a space between")
        yield Passage(context, space + word)
