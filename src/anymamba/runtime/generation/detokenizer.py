"""Text that appears while its tokens are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from anymamba.errors import InputError
from anymamba.renamed import old_names

# What decoders write for bytes that are not, or not yet, a character.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes. Of one that is not whole yet there are at most three, for
# which decoders write one replacement, or one for each byte.
_MOST_UNFINISHED = 3
# After so many tokens without a clean border, and again after as many more, the row is shortened.
_LONG = 16


class StreamingDetokenizer:
    """Turns tokens, which come one by one, into pieces of text that can be shown at once.

    A character is given out when all of its bytes are there. The pieces together are the text
    that `detokenize` makes of all tokens, up to the first stop string. A stop string is found
    wherever it begins and ends in the tokens, and is itself never given out: what may become one
    is held back. Of several, that counts which is complete first.

    A token costs the same however many came before: only the last few are decoded again. It
    follows that a decoder may let a token's text depend on the few tokens before it (a leading
    space, bytes that become a character), not on later ones once the text stood there complete.

    Args:
        detokenize: makes a text of tokens. Bytes that are no UTF-8 become U+FFFD.
        stop: the stop strings, none of them empty.

    Raises:
        InputError: a stop string is empty.

    Attributes:
        stop_string: the stop string that ended the text; None as long as there was none.

    Example:
        >>> as_text = lambda ids: bytes(ids).decode(errors="replace")
        >>> stream = StreamingDetokenizer(as_text, stop=["END"])
        >>> [stream.add(byte) for byte in "é: EN END!".encode()]
        ['', 'é', ':', ' ', '', '', 'EN ', '', '', '', '']
        >>> stream.finish(), stream.stop_string
        ('', 'END')
    """

    def __init__(
        self, detokenize: Callable[[Sequence[int]], str], stop: Sequence[str] = ()
    ) -> None:
        self.stop_string: str | None = None
        self._window = _Window(detokenize)
        self._stop = _StopFinder(stop)

    def add(self, token: int) -> str:
        """Take one more token.

        Args:
            token: its id. What comes after a stop string is ignored.

        Returns:
            The text that is now certain and was not given out before, often empty.
        """
        return "" if self.stop_string is not None else self._given(self._window.add(token))

    def finish(self) -> str:
        """Say that no more tokens come.

        Returns:
            What was held back: the beginning of what did not become a stop string, and U+FFFD
            for the bytes of an unfinished character.
        """
        if self.stop_string is not None:
            return ""
        piece = self._given(self._window.finish())
        return piece if self.stop_string is not None else piece + self._stop.rest()

    def _given(self, text: str) -> str:
        piece, self.stop_string = self._stop.add(text)
        return piece


class _Window:
    """The last tokens, decoded together, and how much of their text is known to stay.

    The context are tokens whose text was given out. They are decoded again together with the
    pending ones, those after them, because some decoders treat the first token otherwise than
    the rest: they take its leading space.
    """

    def __init__(self, detokenize: Callable[[Sequence[int]], str]) -> None:
        self._detokenize = detokenize
        self._context: list[int] = []
        self._context_text = ""
        self._pending: list[int] = []
        self._text = ""  # of the pending tokens
        self._given = 0  # so many characters of it were given out

    def add(self, token: int) -> str:
        """Take a token; return the text that is certain now and was not before."""
        self._pending.append(token)
        text = self._pending_text()
        if text == self._text and self._is_silent(token):
            self._pending.pop()
            return ""
        if not text.startswith(self._text[: self._given]):
            text = self._text_without_given()
        certain = max(self._given, len(text) - _unfinished(text))
        piece = text[self._given : certain]
        self._text, self._given = text, certain
        if text and not text.endswith(_REPLACEMENT):
            self._make_context()
        elif len(self._pending) % _LONG == 0:
            self._shorten()
        return piece

    def finish(self) -> str:
        """Return the text that never became certain."""
        piece = self._text[self._given :]
        self._given = len(self._text)
        return piece

    def _pending_text(self) -> str:
        text = self._detokenize(self._context + self._pending)
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        # Where a vocabulary falls back to bytes, one byte that is not yet a character spoils all
        # of the bytes before it, also those that were.
        return self._detokenize(self._pending)

    def _text_without_given(self) -> str:
        """Begin anew with the tokens whose text was not given out: that of others has changed.

        With such a vocabulary a shortened row of bytes may turn out to be characters after all.
        """
        unknown = len(self._text) - self._given  # replacements, one for each token
        self._context, self._context_text = [], ""
        self._pending, self._given = self._pending[-unknown - 1 :], 0
        return self._detokenize(self._pending)

    def _is_silent(self, token: int) -> bool:
        # Such are special tokens. A space that is not shown at the beginning is shown if doubled.
        return self._detokenize([token, token]) == ""

    def _make_context(self) -> None:
        """The pending tokens' text is complete: decode what comes after them only."""
        alone = self._detokenize(self._pending)
        # A decoder that drops all spaces at the beginning, not one, would drop those of the next
        # token together with a context of nothing but spaces.
        if alone == self._text or alone.strip() or self._detokenize(self._pending * 2):
            self._context, self._context_text = self._pending, alone
        else:
            self._context = self._context + self._pending
            self._context_text += self._text
        self._pending, self._text, self._given = [], "", 0

    def _shorten(self) -> None:
        """Forget half of the pending tokens, though none of them ends with a whole character.

        Decoding may then begin within a character. What is left of it, three bytes at most,
        becomes as many replacements, and what comes after them is read as before.
        """
        unknown = len(self._text) - self._given
        half = len(self._pending) // 2
        for first in range(half, half + _MOST_UNFINISHED + 1):
            text = self._detokenize(self._pending[first:])
            read_as_before = self._text.endswith(text[_MOST_UNFINISHED:])
            if read_as_before and len(text) - unknown > _MOST_UNFINISHED:
                self._context, self._context_text = [], ""
                self._pending, self._text = self._pending[first:], text
                self._given = len(text) - unknown
                return


def _unfinished(text: str) -> int:
    """How many characters at the text's end may be bytes of one that is not whole yet."""
    end = text[-_MOST_UNFINISHED:]
    return len(end) - len(end.rstrip(_REPLACEMENT))


class _StopFinder:
    """Finds stop strings in pieces of text, and holds back what may become one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in self._stops:
            raise InputError("a stop string is empty, expected at least one character")
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def add(self, text: str) -> tuple[str, str | None]:
        """Take a piece of text; return what can be given out, and the stop string after it."""
        self._held += text
        found = [
            (at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0
        ]
        if found:
            _, at, stop = min(found)
            return self._release(at), stop
        return self._release(len(self._held) - self._possible_beginning()), None

    def rest(self) -> str:
        """What was held back."""
        return self._release(len(self._held))

    def _possible_beginning(self) -> int:
        """How much of the held text's end may be the beginning of a stop string."""
        for length in range(min(self._longest - 1, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0

    def _release(self, length: int) -> str:
        piece, self._held = self._held[:length], self._held[length:]
        return piece


__getattr__ = old_names(__name__)
