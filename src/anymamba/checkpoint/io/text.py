"""Texts, and JSON with one value a line, as users give them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from anymamba.checkpoint.io.messages import not_text
from anymamba.errors import InputError

_MARK = "\N{BYTE ORDER MARK}"  # some editors mark a file as UTF-8


def read_text(path: Path) -> str:
    """The text of a file, without the mark that some editors put at its beginning.

    Raises:
        InputError: it cannot be read, or is not UTF-8 text.
    """
    name = repr(str(path))
    try:
        data = path.read_bytes()
        text = data.decode("utf-8").removeprefix(_MARK)
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(not_text(name, data, error.start)) from None
    if "\0" in text:
        raise InputError(not_text(name, data, data.index(0)))
    return text


def parse_json_lines(
    blocks: Iterable[str], name: str, parse_constant: Callable[[str], Any] | None = None
) -> Iterator[tuple[Any, str]]:
    """The value in each line of JSON, and what messages call the line. Empty lines do not count.

    Args:
        blocks: the text, cut anywhere.
        name: what messages call the text.
        parse_constant: as for `json.loads`.

    Raises:
        InputError: a line is not JSON, or holds what is no text.

    Example:
        >>> list(parse_json_lines(['{"text": ', '"to be"}'], "'a.jsonl'"))
        [({'text': 'to be'}, "line 1 of 'a.jsonl'")]
    """
    for number, line in enumerate(_lines_of(blocks), start=1):
        if not line.strip():
            continue
        where = f"line {number} of {name}"
        try:
            value = json.loads(line, parse_constant=parse_constant)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is not JSON: {error}") from None
        if "\\ud" in line.lower():
            check_surrogates(value, where)
        yield value, where


def _lines_of(blocks: Iterable[str]) -> Iterator[str]:
    rest = ""
    for number, block in enumerate(blocks):
        *lines, rest = (rest + (block if number else block.removeprefix(_MARK))).split("\n")
        yield from lines
    yield rest


def check_surrogates(value: object, where: str) -> None:
    """Refuse what JSON can spell and no text can hold, so that no tokenizer would take it.

    Args:
        value: a text, or another value of JSON.
        where: what messages call it.

    Raises:
        InputError: it holds half of a surrogate pair. Python reads bytes that are no text as such.

    Example:
        >>> check_surrogates(["a", "\\ud83d\\ude00"], "the example")
        Traceback (most recent call last):
            ...
        anymamba.errors.InputError: the example holds half of a surrogate pair, or bytes that are \
not UTF-8: write it anew
    """
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(
            f"{where} holds half of a surrogate pair, or bytes that are not UTF-8: write it anew"
        ) from None
