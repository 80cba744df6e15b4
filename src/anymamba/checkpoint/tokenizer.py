"""Reading a tokenizer.json, or a file of SentencePiece's, within limits: it comes from a stranger.

The rules of a tokenizer.json rewrite a text one after the other, each what the one before it has
made: thirty rules that double a letter make a thousand million letters of one. A file is refused
where its rules together could do so.
"""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anymamba.checkpoint.gguf import sentencepiece_file
from anymamba.checkpoint.io import escaped, user_path
from anymamba.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

HELP = (
    "Name a folder that has a tokenizer.json (tokenizer=, on the command line --tokenizer; the "
    "state-spaces/mamba models use that of EleutherAI/gpt-neox-20b), or give tokens, not text"
)
"""What to do where a model comes without a tokenizer."""

JSON = "tokenizer.json"
_MOST_BYTES = 1 << 28

MOST_GROWTH = 256
"""How many characters or tokens may come of one. Those in use make fewer than ten."""

MOST_TOKEN_CHARACTERS = 4096
"""How long the text of a single token may be. The longest in use are rows of 128 spaces."""


def read_tokenizer(place: str | os.PathLike[str]) -> Tokenizer:
    """Read a tokenizer of the `tokenizers` library: a tokenizer.json, or the one in a folder.

    Args:
        place: the file or the folder; a file of SentencePiece's by the name of one.

    Raises:
        CheckpointError: there is none, or it cannot be read.

    Example:
        >>> from anymamba.assets import bundled_model
        >>> read_tokenizer(bundled_model()).get_vocab_size()
        256
    """
    given = user_path(place)
    path = tokenizer_file(given) if given.is_dir() else given
    if path is None or not path.is_file():
        missing = path or given / JSON
        raise CheckpointError(f"there is no tokenizer: {missing} is missing. {HELP}")
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise CheckpointError(
                f"{str(path)!r} has {size:,} bytes, which no tokenizer of a Mamba has (at most "
                f"{_MOST_BYTES:,}); is it the right file?"
            )
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error.strerror}") from error
    if path.name in sentencepiece_file.NAMES:
        return tokenizer_from_json(sentencepiece_file.to_json(text, str(path)), str(path))
    return tokenizer_from_json(text, str(path))


def tokenizer_file(folder: Path) -> Path | None:
    """The file of a folder's tokenizer: its tokenizer.json, else one of SentencePiece's, or None.

    Example:
        >>> from anymamba.assets import bundled_model
        >>> tokenizer_file(bundled_model()).name
        'tokenizer.json'
    """
    names = (JSON, *sentencepiece_file.NAMES)
    return next((folder / name for name in names if (folder / name).is_file()), None)


def tokenizer_from_json(text: str | bytes, where: str) -> Tokenizer:
    """Make a tokenizer of the text of a tokenizer.json; `where` is what messages call it.

    Raises:
        CheckpointError: it cannot be read.

    Example:
        >>> tokenizer_from_json("{}", "an empty one")
        Traceback (most recent call last):
            ...
        anymamba.errors.CheckpointError: an empty one is no tokenizer that can be read: ...
    """
    from tokenizers import Tokenizer

    make: Any = Tokenizer.from_buffer if isinstance(text, bytes) else Tokenizer.from_str
    try:
        tokenizer: Tokenizer = make(text)
    except BaseException as error:
        raise_if_foreign(error)
        raise CheckpointError(
            f"{where} is no tokenizer that can be read: {reason_of(error)}"
        ) from None
    check_limits(tokenizer, text if isinstance(text, bytes) else text.encode(), where)
    # What trainers set would cut long texts off in silence.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def raise_if_foreign(error: BaseException) -> None:
    """Raise again what does not come from the `tokenizers` library.

    It raises nothing narrower than Exception, and where it panics, what is no Exception at all.

    Example:
        >>> raise_if_foreign(ValueError("from the library"))
    """
    if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
        raise error


def reason_of(error: BaseException) -> str:
    """What the library says, on one line that a terminal can show.

    Example:
        >>> reason_of(ValueError("two\\nlines"))
        'two lines'
    """
    return escaped(" ".join(str(error).split()), 200)


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
