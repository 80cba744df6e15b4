"""The tokenizer that belongs to a model. Its library is imported when a text is first asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from anymamba.checkpoint.paths import user_path
from anymamba.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["TextCodec", "read_tokenizer", "tokenizer_from_json"]

_HELP = (
    "Name a folder that has a tokenizer.json (tokenizer=, on the command line --tokenizer; the "
    "state-spaces/mamba models use that of EleutherAI/gpt-neox-20b), or give tokens, not text"
)

_LARGEST = 1 << 28


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
            self._tokenizer = self._open()
        return self._tokenizer

    def encode(self, text: str, special: bool) -> list[int]:
        """The tokens of a text, with those that the tokenizer puts at its borders if `special`."""
        try:
            return list(self.tokenizer.encode(text, add_special_tokens=special).ids)
        except (TypeError, UnicodeError) as error:
            reason = str(error)
            # The library does not say so. Python keeps bytes that are no text as such halves.
            if isinstance(text, str) and any("\ud800" <= sign <= "\udfff" for sign in text):
                reason = "it holds half of a surrogate pair, or bytes that are not UTF-8"
            raise InputError(f"the text cannot be encoded: {reason}") from error

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
    # The library raises nothing narrower, and where it panics, what is no Exception at all.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{where} is no tokenizer that can be read: {reason}") from None
    # What trainers set would cut long texts off in silence.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
