"""Reading a JSON object that someone else wrote: bounded in size, no name twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from anymamba.checkpoint.io.messages import shown
from anymamba.errors import CheckpointError

# Parsed JSON takes up to some thirty times its text. The largest header or index of a Mamba
# checkpoint is a fiftieth of this.
MAX_JSON_BYTES = 8 << 20


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
