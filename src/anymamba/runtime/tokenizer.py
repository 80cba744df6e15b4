"""Text to tokens and back. The tokenizer is read when a text is first asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from anymamba.checkpoint.io import check_surrogates, shown
from anymamba.checkpoint.tokenizer import HELP, raise_if_foreign, reason_of
from anymamba.errors import InputError, NoTokenizerError
from anymamba.renamed import old_names

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

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
        >>> from anymamba.checkpoint.tokenizer import read_tokenizer
        >>> codec = TextCodec(lambda: read_tokenizer(bundled_model()))
        >>> codec.encode("Hi", special=True), codec.decode([72, 105])
        ([72, 105], 'Hi')
    """

    def __init__(self, open_tokenizer: Callable[[], Tokenizer] | None) -> None:
        self._open = open_tokenizer
        self._encodes_slowly = self._decodes_slowly = False

    @property
    def exists(self) -> bool:
        """Whether the model has a tokenizer."""
        return self._open is not None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer itself.

        Raises:
            NoTokenizerError: there is none.
            CheckpointError: it cannot be read.
        """
        if self._open is None:
            raise NoTokenizerError(f"the model comes without a tokenizer. {HELP}")
        tokenizer = self._open()
        self._encodes_slowly = _has_pattern(tokenizer.normalizer, tokenizer.pre_tokenizer)
        self._decodes_slowly = _has_pattern(tokenizer.decoder)
        return tokenizer

    def encode(self, text: str, special: bool) -> list[int]:
        """The tokens of a text, with those that the tokenizer puts at its borders if `special`."""
        tokenizer = self.tokenizer
        try:
            if not isinstance(text, str) or (len(text) < _LONG and not self._encodes_slowly):
                return list(tokenizer.encode(text, add_special_tokens=special).ids)
            encode = partial(tokenizer.encode_batch_fast, [text], add_special_tokens=special)
            return list(_aside(encode, _most_seconds(len(text)))[0].ids)
        except (TypeError, UnicodeError) as error:
            if isinstance(text, str):
                check_surrogates(text, "the text")  # the library does not say so
            raise InputError(f"the text cannot be encoded: {error}") from error
        except BaseException as error:
            raise_if_foreign(error)
            raise InputError(f"the tokenizer fails at the text: {reason_of(error)}") from None

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
            raise_if_foreign(error)
            raise InputError(f"the tokenizer fails at the tokens: {reason_of(error)}") from None


def as_token_ids(ids: Any) -> NDArray[np.integer]:
    """Take what is to be a row of tokens as an array.

    Raises:
        InputError: it is none.

    Example:
        >>> as_token_ids([72, 105])
        array([ 72, 105])
    """
    import numpy as np

    try:
        found = np.asarray(ids)
    except ValueError:  # lists of different lengths
        found = np.empty((0, 0))
    if found.size == 0 and found.ndim == 1:
        return found.astype(np.int64)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise InputError(
            f"expected a text, or the whole numbers of its tokens in a row, got {shown(ids)}"
        )
    return found


def check_vocabulary(ids: NDArray[np.integer], vocabulary: int, where: str) -> None:
    """Refuse tokens that a model does not have.

    Raises:
        InputError: the message names the first of them, and where it stands.
    """
    wrong = ids[(ids < 0) | (ids >= vocabulary)]
    if wrong.size:
        raise InputError(
            f"{where} has token {wrong[0]}, expected 0 to {vocabulary - 1}, the model's "
            "vocabulary: the tokenizer does not belong to the model, or the token was mistyped"
        )


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


__getattr__ = old_names(__name__)
