"""Text that appears while its tokens are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["TextStream"]

# What decoders write for bytes that are not, or not yet, a character.
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Turns tokens, which come one by one, into pieces of text that can be shown at once.

    A character is shown when all of its bytes are there. A stop string is found wherever it
    begins and ends in the tokens, and is itself never shown: what may become one is held back.

    Args:
        decode: makes a text of tokens.
        show: receives each piece.
        stops: the stop strings, none of them empty.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        show: Callable[[str], object],
        stops: Sequence[str] = (),
    ) -> None:
        self.text = ""
        self.stopped = False
        self._decode = decode
        self._show = show
        self._stops = stops
        # Some decoders drop the space before their first token, so that new tokens are decoded
        # together with those before them.
        self._before: list[int] = []
        self._undecoded: list[int] = []
        self._held = ""

    def add(self, token: int) -> None:
        """Take one more token."""
        self._undecoded.append(token)
        piece = self._decoded()
        if piece and not piece.endswith(_UNFINISHED):
            self._take(piece)

    def finish(self) -> None:
        """Show what was held back: nothing more will come."""
        self._take(self._decoded())
        if not self.stopped:
            self._release(len(self._held))

    def _decoded(self) -> str:
        known = self._decode(self._before)
        return self._decode(self._before + self._undecoded)[len(known) :]

    def _take(self, piece: str) -> None:
        self._before, self._undecoded = self._undecoded, []
        if self.stopped:
            return
        self._held += piece
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        self.stopped = bool(found)
        self._release(min(found) if found else len(self._held) - self._possible_beginning())

    def _possible_beginning(self) -> int:
        """How much of the held text's end may be the beginning of a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0

    def _release(self, length: int) -> None:
        piece, self._held = self._held[:length], self._held[length:]
        if piece:
            self.text += piece
            self._show(piece)
