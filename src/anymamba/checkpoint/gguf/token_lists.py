"""The lists of a tokenizer in a GGUF header that every kind of tokenizer has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from anymamba.checkpoint.io import shown
from anymamba.errors import CheckpointError

PREFIX = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""llama.cpp's types of tokens."""


def texts_of(metadata: Mapping[str, Any], name: str, where: str) -> list[str]:
    """A list of texts.

    Raises:
        CheckpointError: it is missing, or another list.

    Example:
        >>> texts_of({"tokenizer.ggml.tokens": ["a", "b"]}, "tokens", "the example")
        ['a', 'b']
    """
    value = metadata.get(PREFIX + name)
    if not isinstance(value, list):  # of texts: those of numbers are tuples
        refuse_broken(where, f"{PREFIX}{name} must be a list of texts, got {shown(value)}")
    return value


def types_of(metadata: Mapping[str, Any], count: int, where: str) -> list[int]:
    """The type of each token.

    Raises:
        CheckpointError: there are not as many types as tokens.

    Example:
        >>> types_of({"tokenizer.ggml.token_type": (1, 3)}, 2, "the example")
        [1, 3]
    """
    value = metadata.get(PREFIX + "token_type")
    if value is None:
        return [NORMAL] * count
    if not isinstance(value, tuple) or len(value) != count:
        refuse_broken(where, f"{PREFIX}token_type must have one number for each of {count} tokens")
    return list(value)


def added_tokens(tokens: list[str], types: list[int]) -> list[dict[str, Any]]:
    """The tokens that are found in a text before anything is cut or merged."""
    rules = {"single_word": False, "lstrip": False, "rstrip": False}
    return [
        {"id": i, "content": token, **rules, "normalized": not special, "special": special}
        for i, token in enumerate(tokens)
        if types[i] in (UNKNOWN, CONTROL, USER_DEFINED) and token
        for special in [types[i] != USER_DEFINED]
    ]


def post_processor(
    metadata: Mapping[str, Any], tokens: list[str], where: str
) -> dict[str, Any] | None:
    """What adds the tokens that belong before and behind every text, or None where none do.

    Raises:
        CheckpointError: such a token is none.
    """
    around: dict[str, dict[str, Any] | None] = {"bos": None, "eos": None}
    special: dict[str, Any] = {}
    for name in around:
        if not metadata.get(f"{PREFIX}add_{name}_token"):
            continue
        number = metadata.get(f"{PREFIX}{name}_token_id")
        if type(number) is not int or not 0 <= number < len(tokens):
            refuse_broken(where, f"{PREFIX}{name}_token_id is {shown(number)}, which is no token")
        token = tokens[number]
        special[token] = {"id": token, "ids": [number], "tokens": [token]}
        around[name] = {"SpecialToken": {"id": token, "type_id": 0}}
    if not special:
        return None

    def with_text(letter: str, type_id: int) -> list[Any]:
        text = {"Sequence": {"id": letter, "type_id": type_id}}
        return [part for part in (around["bos"], text, around["eos"]) if part]

    single, second = with_text("A", 0), with_text("B", 1)
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single + second,
        "special_tokens": special,
    }


def refuse_broken(where: str, defect: str) -> NoReturn:
    """Refuse a broken tokenizer."""
    raise CheckpointError(f"the tokenizer in {where} is broken: {defect}")
