"""Reading texts and JSON that someone else wrote, and checking what they hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from anymamba.checkpoint.io.messages import not_text, shown
from anymamba.errors import CheckpointError, InputError

# Parsed JSON takes up to some thirty times its text. The largest header or index of a Mamba
# checkpoint is a fiftieth of this.
MAX_JSON_BYTES = 8 << 20

_MARK = "\N{BYTE ORDER MARK}"  # some editors mark a file as UTF-8


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file of at most `MAX_JSON_BYTES` that holds one JSON object.

    Raises:
        CheckpointError: the file is missing, too large, or is no JSON object.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "config.json"
        >>> _ = path.write_text('{"d_model": 64}')
        >>> read_json_object(path)
        {'d_model': 64}
    """
    return parse_json_object(read_bounded(path), repr(str(path)))


def read_bounded(path: Path, most: int = MAX_JSON_BYTES) -> bytes:
    """Read a file of at most so many bytes.

    Raises:
        CheckpointError: it is missing, cannot be read, or is larger.
    """
    if not path.is_file():
        raise CheckpointError(f"{str(path)!r} is missing or is not a file")
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error.strerror}") from error
    if len(data) > most:
        raise CheckpointError(f"{str(path)!r} is larger than the {most} bytes allowed")
    return data


def parse_json_object(text: bytes, where: str) -> dict[str, Any]:
    """Parse UTF-8 text that is one JSON object; the caller has limited its size.

    Raises:
        CheckpointError: the text is not UTF-8, not JSON, not an object, nested too deeply, or
            an object in it has one name twice.

    Example:
        >>> parse_json_object(b'{"a": 1}', "the example")
        {'a': 1}
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_without_repetition)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where} is not UTF-8 text (byte {error.start})") from error
    except RecursionError:
        raise CheckpointError(f"{where} is nested too deeply to be read") from None
    except ValueError as error:  # json's own error is one; so is an integer of 5,000 digits
        raise CheckpointError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} must hold a JSON object, got {shown(value)}")
    return value


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Where a name stands twice, two readers may believe two different values.
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"the name {shown(name)} stands twice in one object")
        result[name] = value
    return result


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
        >>> check_surrogates(["a", "\\ud800"], "the example")
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
