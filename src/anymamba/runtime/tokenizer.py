"""The tokenizer that belongs to a model. Its library is imported when a text is first asked for."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from anymamba.checkpoint.paths import user_path
from anymamba.checkpoint.wording import escaped
from anymamba.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["TextCodec", "read_tokenizer", "tokenizer_from_json"]

_HELP = (
    "Name a folder that has a tokenizer.json (tokenizer=, on the command line --tokenizer; the "
    "state-spaces/mamba models use that of EleutherAI/gpt-neox-20b), or give tokens, not text"
)

_LARGEST = 1 << 28

# What a tokenizer may write in place of a character of a text, or around the text.
_MOST_REPLACEMENT = 4096

_LONG_TEXT = 4096


class TextCodec:
    """Makes tokens of text, and text of tokens.

    Args:
        open_tokenizer: finds the tokenizer, once it is needed; None where the model has none.

    Example:
        >>> from anymamba.assets import bundled_model
        >>> codec = TextCodec(lambda: read_tokenizer(bundled_model()))
        >>> codec.encode("Hi", special=True), codec.decode([72, 105])
        ([72, 105], 'Hi')
    """

    def __init__(self, open_tokenizer: Callable[[], Tokenizer] | None) -> None:
        self._open = open_tokenizer
        self._tokenizer: Tokenizer | None = None
        self._has_pattern = False

    @property
    def exists(self) -> bool:
        """Whether the model has a tokenizer."""
        return self._open is not None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer itself.

        Raises:
            CheckpointError: there is none, or it cannot be read.
        """
        if self._tokenizer is None:
            if self._open is None:
                raise CheckpointError(f"the model comes without a tokenizer. {_HELP}")
            tokenizer = self._open()
            # A pattern of its own may take seconds for a few characters.
            self._has_pattern = "Regex(" in f"{tokenizer.normalizer!r} {tokenizer.pre_tokenizer!r}"
            self._tokenizer = tokenizer
        return self._tokenizer

    def encode(self, text: str, special: bool) -> list[int]:
        """The tokens of a text, with those that the tokenizer puts at its borders if `special`."""
        tokenizer = self.tokenizer
        try:
            if isinstance(text, str) and (len(text) >= _LONG_TEXT or self._has_pattern):
                return _encode_aside(tokenizer, text, special)
            return list(tokenizer.encode(text, add_special_tokens=special).ids)
        except (TypeError, UnicodeError) as error:
            reason = str(error)
            # The library does not say so. Python keeps bytes that are no text as such halves.
            if isinstance(text, str) and any("\ud800" <= sign <= "\udfff" for sign in text):
                reason = "it holds half of a surrogate pair, or bytes that are not UTF-8"
            raise InputError(f"the text cannot be encoded: {reason}") from error
        except BaseException as error:
            _raise_if_foreign(error)
            raise InputError(f"the tokenizer fails at the text: {_reason(error)}") from None

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of tokens, without special ones if `skip_special`."""
        try:
            return str(self.tokenizer.decode(list(ids), skip_special_tokens=skip_special))
        except (TypeError, OverflowError) as error:
            raise InputError(f"tokens must be whole numbers, 0 or more: {error}") from error


def read_tokenizer(place: str | os.PathLike[str]) -> Tokenizer:
    """Read a tokenizer in the format of the `tokenizers` library.

    Args:
        place: a tokenizer.json, or the folder that holds it.

    Raises:
        CheckpointError: there is none, or it cannot be read.

    Example:
        >>> from anymamba.assets import bundled_model
        >>> read_tokenizer(bundled_model()).get_vocab_size()
        256
    """
    given = user_path(place)
    path = given / "tokenizer.json" if given.is_dir() else given
    if not path.is_file():
        raise CheckpointError(f"there is no tokenizer: {path} is missing. {_HELP}")
    try:
        size = path.stat().st_size
        if size > _LARGEST:
            raise CheckpointError(
                f"{str(path)!r} has {size:,} bytes, which no tokenizer of a Mamba has (at most "
                f"{_LARGEST:,}); is it the right file?"
            )
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error.strerror}") from error
    return tokenizer_from_json(text, str(path))


def tokenizer_from_json(text: str | bytes, where: str) -> Tokenizer:
    """Make a tokenizer of the text of a tokenizer.json.

    Args:
        text: the JSON.
        where: what it is, for the message.

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
        _raise_if_foreign(error)
        raise CheckpointError(
            f"{where} is no tokenizer that can be read: {_reason(error)}"
        ) from None
    _check_replacements(tokenizer, where)
    # What trainers set would cut long texts off in silence.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _raise_if_foreign(error: BaseException) -> None:
    """Raise again what does not come from the library.

    It raises nothing narrower than Exception, and where it panics, what is no Exception at all.
    """
    if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
        raise error


def _reason(error: BaseException) -> str:
    return escaped(" ".join(str(error).split()), 200)


def _encode_aside(tokenizer: Tokenizer, text: str, special: bool) -> list[int]:
    """The tokens of a text, made in a thread of its own, so that Ctrl-C is heard meanwhile."""
    outcome: list[Any] = []

    def encode() -> None:
        try:
            # Of the library's methods this one gives Python's lock to others.
            encoded = tokenizer.encode_batch_fast([text], add_special_tokens=special)
            outcome.append(list(encoded[0].ids))
        except BaseException as error:
            outcome.append(error)

    # A daemon: whoever presses Ctrl-C does not wait for what nobody needs any more.
    thread = threading.Thread(target=encode, name="anymamba-tokenizer", daemon=True)
    thread.start()
    thread.join()
    (found,) = outcome
    if isinstance(found, BaseException):
        raise found
    ids: list[int] = found
    return ids


def _check_replacements(tokenizer: Tokenizer, where: str) -> None:
    """Refuse a tokenizer that makes gigabytes of a short text."""
    for part in (tokenizer.normalizer, tokenizer.post_processor, tokenizer.decoder):
        if part is None:
            continue
        length = sum(_lengths_of_replacements(json.loads(part.__getstate__())))
        if length > _MOST_REPLACEMENT:
            raise CheckpointError(
                f"{where} replaces characters by texts of {length:,} characters together, which no "
                f"tokenizer of a Mamba does (at most {_MOST_REPLACEMENT:,})"
            )


def _lengths_of_replacements(state: Any) -> Iterator[int]:
    """How long the texts and lists of tokens are that a part of a tokenizer inserts."""
    if isinstance(state, list):
        for entry in state:
            yield from _lengths_of_replacements(entry)
    elif isinstance(state, dict):
        for name, value in state.items():
            if name in ("content", "prepend", "ids", "tokens", "single", "pair"):
                yield len(value)
            yield from _lengths_of_replacements(value)
