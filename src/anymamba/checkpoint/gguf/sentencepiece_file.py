"""A file of SentencePiece's, as Mistral's `tokenizer.model.v3`, to the text of a tokenizer.json.

The file is a message of protocol buffers, `ModelProto` of sentencepiece_model.proto. A few of its
fields count: the pieces with their scores and types, the kind of model, and how texts are
normalized. llama.cpp gave the types the same numbers in GGUF files, so that one function makes a
tokenizer of either.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

from anymamba.checkpoint.gguf.sentencepiece import from_sentencepiece
from anymamba.checkpoint.gguf.token_lists import NORMAL, PREFIX, refuse_broken
from anymamba.checkpoint.io import shown
from anymamba.errors import CheckpointError

NAMES = ("tokenizer.model.v3", "tokenizer.model")
"""How such a file is called, the first that is there."""

_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _BPE = 3, 2
_BOS, _EOS = 41, 42
_NONE = 2**64 - 1  # -1, as protocol buffers write it
_CHARSMAP, _ADD_DUMMY_PREFIX, _REMOVE_EXTRA_WHITESPACES, _ESCAPE_WHITESPACES = 2, 3, 4, 5


def to_json(data: bytes, where: str) -> str:
    """Make a tokenizer.json of a file of SentencePiece's.

    Args:
        data: the file.
        where: what messages call it.

    Returns:
        The tokenizer.json. Texts begin with the file's token for that, as in Llama and Mistral.

    Raises:
        CheckpointError: the file is broken, or its model is not BPE with byte fallback, or rewrites
            texts otherwise than by spaces.

    Example:
        >>> to_json(b"", "the empty file")
        Traceback (most recent call last):
            ...
        anymamba.errors.CheckpointError: the tokenizer in the empty file is broken: it has no pieces
    """
    pieces, trainer, normalizer = [], {}, {}
    for number, value in _fields(data, where):
        if number == _PIECES:
            pieces.append(_message(value, where))
        elif number == _TRAINER:
            trainer = _message(value, where)
        elif number == _NORMALIZER:
            normalizer = _message(value, where)
    if not pieces:
        refuse_broken(where, "it has no pieces")
    _refuse_others(trainer, normalizer, where)
    header: dict[str, Any] = {
        "tokens": [_text(piece.get(_PIECE), where) for piece in pieces],
        "scores": tuple(_score(piece.get(_SCORE, 0), where) for piece in pieces),
        "token_type": tuple(piece.get(_TYPE, NORMAL) for piece in pieces),
        "add_space_prefix": bool(normalizer.get(_ADD_DUMMY_PREFIX, 1)),
        "add_bos_token": trainer.get(_BOS, 1) != _NONE,
        "bos_token_id": trainer.get(_BOS, 1),
        "eos_token_id": trainer.get(_EOS, 2),
    }
    metadata = {PREFIX + name: value for name, value in header.items()}
    return json.dumps(from_sentencepiece(metadata, where), ensure_ascii=False)


def _refuse_others(trainer: dict[int, Any], normalizer: dict[int, Any], where: str) -> None:
    defect = None
    if trainer.get(_MODEL_TYPE, 1) != _BPE:
        defect = "its model is not BPE"
    elif normalizer.get(_CHARSMAP):
        defect = "it rewrites characters before it cuts a text"
    elif normalizer.get(_REMOVE_EXTRA_WHITESPACES, 1):
        defect = "it removes spaces"
    elif not normalizer.get(_ESCAPE_WHITESPACES, 1):
        defect = "it does not write spaces as U+2581"
    if defect:
        raise CheckpointError(
            f"the tokenizer in {where} cannot be read: {defect}; put a tokenizer.json beside it"
        )


def _message(value: Any, where: str) -> dict[int, Any]:
    """The fields of a message inside; of a repeated one the last, as protocol buffers want it."""
    if not isinstance(value, bytes):
        refuse_broken(where, f"{shown(value)} stands where a message should")
    return dict(_fields(value, where))


def _text(value: Any, where: str) -> str:
    try:
        return str(value, "utf-8")
    except (TypeError, UnicodeDecodeError):
        refuse_broken(where, f"{shown(value)} stands where a piece's text should")


def _score(value: Any, where: str) -> float:
    if type(value) not in (int, float):
        refuse_broken(where, f"{shown(value)} stands where a piece's score should")
    return float(value)


def _fields(data: bytes, where: str) -> Iterator[tuple[int, Any]]:
    """Each field's number and value: whole numbers, floats of four bytes, and bytes."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place, where)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, place = _varint(data, place, where)
            yield number, value
            continue
        if kind not in (_EIGHT_BYTES, _BYTES, _FOUR_BYTES):
            refuse_broken(where, f"field {number} has the unknown type {kind}")
        count = {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}.get(kind)
        if count is None:
            count, place = _varint(data, place, where)
        piece = data[place : place + count]
        if len(piece) < count:
            refuse_broken(where, "it is truncated; fetch it again")
        place += count
        yield number, struct.unpack("<f", piece)[0] if kind == _FOUR_BYTES else piece


def _varint(data: bytes, place: int, where: str) -> tuple[int, int]:
    """A whole number of seven bits a byte, the lowest first, and the place behind it."""
    end = place
    while end < len(data) and data[end] >= 0x80:
        end += 1
    if end == len(data):
        refuse_broken(where, "it is truncated; fetch it again")
    if end - place > 9:
        refuse_broken(where, "a number in it is longer than 64 bits")
    sevens = (byte & 0x7F for byte in data[place : end + 1])
    return sum(seven << 7 * i for i, seven in enumerate(sevens)), end + 1
