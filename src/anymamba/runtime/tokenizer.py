"""The tokenizer that belongs to a model. Its library is imported when a text is first asked for."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from anymamba.checkpoint.paths import user_path
from anymamba.checkpoint.wording import escaped
from anymamba.errors import CheckpointError, InputError
from anymamba.runtime.tokenizer_limits import check_limits

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["TextCodec", "read_tokenizer", "tokenizer_from_json"]

_HELP = (
    "Name a folder that has a tokenizer.json (tokenizer=, on the command line --tokenizer; the "
    "state-spaces/mamba models use that of EleutherAI/gpt-neox-20b), or give tokens, not text"
)

_LARGEST = 1 << 28

# Characters or tokens that may take long enough to be interrupted.
_LONG = 4096

# Which time a tokenizer has: a thousandth of the usual speed, in characters or tokens a second.
_MOST_SECONDS = 30.0
_LEAST_SPEED = 2000.0


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
        self._encodes_slowly = self._decodes_slowly = False

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
            self._encodes_slowly = _has_pattern(tokenizer.normalizer, tokenizer.pre_tokenizer)
            self._decodes_slowly = _has_pattern(tokenizer.decoder)
            self._tokenizer = tokenizer
        return self._tokenizer

    def encode(self, text: str, special: bool) -> list[int]:
        """The tokens of a text, with those that the tokenizer puts at its borders if `special`."""
        tokenizer = self.tokenizer
        try:
            if not isinstance(text, str) or (len(text) < _LONG and not self._encodes_slowly):
                return list(tokenizer.encode(text, add_special_tokens=special).ids)
            encode = partial(tokenizer.encode_batch_fast, [text], add_special_tokens=special)
            return list(_aside(encode, _most_seconds(len(text)))[0].ids)
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
        tokenizer, some = self.tokenizer, list(ids)
        try:
            if len(some) < _LONG and not self._decodes_slowly:
                return str(tokenizer.decode(some, skip_special_tokens=skip_special))
            decode = partial(tokenizer.decode_batch, [some], skip_special_tokens=skip_special)
            return str(_aside(decode, _most_seconds(len(some)))[0])
        except (TypeError, OverflowError) as error:
            raise InputError(f"tokens must be whole numbers, 0 or more: {error}") from error
        except BaseException as error:
            _raise_if_foreign(error)
            raise InputError(f"the tokenizer fails at the tokens: {_reason(error)}") from None


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
    check_limits(tokenizer, text if isinstance(text, bytes) else text.encode(), where)
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


def _aside(call: Callable[[], Any], seconds: float) -> Any:
    """What a call of the library returns, made in a thread, so that Ctrl-C is heard meanwhile.

    The library must give Python's lock to others in it.

    Raises:
        TimeoutError: it takes longer. It goes on, for nobody.
    """
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as error:
            outcome.append(error)

    # A daemon: whoever presses Ctrl-C does not wait for what nobody needs any more.
    thread = threading.Thread(target=run, name="anymamba-tokenizer", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"it takes longer than {seconds:.0f} seconds")
    (found,) = outcome
    if isinstance(found, BaseException):
        raise found
    return found


def _most_seconds(length: int) -> float:
    return _MOST_SECONDS + length / _LEAST_SPEED


def _has_pattern(*parts: Any) -> bool:
    """Whether a regular expression of the file's own is among them.

    It may take seconds for a few characters.
    """
    return any(part is not None and b'"Regex":' in part.__getstate__() for part in parts)
