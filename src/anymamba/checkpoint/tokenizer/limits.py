"""How much a tokenizer may make of a text, and of tokens.

The rules of a tokenizer.json rewrite a text one after the other, each what the one before it has
made: thirty rules that double a letter make a thousand million letters of one. A file is refused
where its rules together could do so.
"""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

from anymamba.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MOST_GROWTH = 256
"""How many characters or tokens may come of one. Those in use make fewer than ten."""

MOST_TOKEN_CHARACTERS = 4096
"""How long the text of a single token may be. The longest in use are rows of 128 spaces."""


def check_limits(tokenizer: Tokenizer, source: bytes, where: str) -> None:
    """Refuse a tokenizer that can make gigabytes of a short text or of a few tokens.

    `source` is the JSON that it was read from.

    Raises:
        CheckpointError: it can.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
        >>> check_limits(tokenizer, tokenizer.to_str().encode(), "tokenizer.json")
    """
    encoding = _growth(tokenizer.normalizer) * _growth(tokenizer.pre_tokenizer)
    for growth in (encoding, _growth(tokenizer.post_processor), _growth(tokenizer.decoder)):
        if growth > MOST_GROWTH:
            raise CheckpointError(
                f"the rules of {where} may make a text {growth:.0f} times as long, which no "
                f"tokenizer of a Mamba does (at most {MOST_GROWTH} times)"
            )
    # To ask for all tokens takes as long as reading the file.
    if _longest_string(source) <= MOST_TOKEN_CHARACTERS:
        return
    longest = max(map(len, tokenizer.get_vocab()), default=0)
    if longest > MOST_TOKEN_CHARACTERS:
        raise CheckpointError(
            f"a token of {where} has {longest:,} characters, which no tokenizer of a Mamba has "
            f"(at most {MOST_TOKEN_CHARACTERS:,})"
        )


def _longest_string(source: bytes) -> int:
    """Of the strings of a JSON text the longest, or a little more."""
    return max(map(len, source.replace(b'\\"', b"''").split(b'"')))


def _growth(part: Any) -> float:
    """How many times as long a part of a tokenizer may make a text."""
    return 1.0 if part is None else _growth_of(json.loads(part.__getstate__()))


def _growth_of(rule: dict[str, Any]) -> float:
    kind = rule["type"]
    if kind == "Sequence":
        (steps,) = (value for value in rule.values() if isinstance(value, list))
        growth = 1.0
        for step in steps:
            growth = min(growth * _growth_of(step), 1e9)
        return growth
    if kind == "Replace":
        found, written = rule["pattern"].get("String"), len(rule["content"])
        # Other patterns may find nothing at all, between any two characters.
        return max(1.0, written / len(found)) if found else 1.0 + written
    if kind == "Prepend":
        return 1.0 + len(rule["prepend"])
    if kind == "ByteLevel":
        return 4.0  # bytes of a character in UTF-8
    if kind == "Metaspace":
        return 2.0  # it may put one before each piece
    if kind == "Precompiled":
        return max(1.0, _longest_in_table(rule["precompiled_charsmap"]))
    if kind == "TemplateProcessing":
        return float(max(_template_length(rule, rule[form]) for form in ("single", "pair")))
    return 1.0


def _longest_in_table(charsmap: str) -> int:
    """The longest text in a table of SentencePiece: after an index and its size, ended by zeros."""
    table = base64.b64decode(charsmap)
    texts = table[4 + int.from_bytes(table[:4], "little") :].split(b"\0")
    return max(len(text.decode(errors="replace")) for text in texts)


def _template_length(rule: dict[str, Any], pieces: list[dict[str, Any]]) -> int:
    special = rule["special_tokens"]
    names = [piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece]
    return len(pieces) - len(names) + sum(len(special[name]["ids"]) for name in names)
