"""Letting a model write: choose a token, read it, choose the next."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from anymamba.runtime.generation.detokenizer import TextStream
from anymamba.runtime.generation.sampling import Sampler, Sampling
from anymamba.runtime.network import Network
from anymamba.runtime.state import Blocks

__all__ = ["Generation", "Piece", "StoppedBy", "Writer", "write_batch", "write_text"]

StoppedBy = Literal["length", "stop", "end"]
"""What ended a text: the number of tokens asked for, a stop string, or an end token."""

TopLogprobs = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """What one new token brings.

    Args:
        text: the text that is certain now; often empty, where a character is not whole yet, or
            what may become a stop string is held back.
        ids: the token, one.
        logprob: its log-probability, if the settings ask for it.
        top_logprobs: the likeliest tokens and theirs, if the settings ask for them.
        stopped_by: on the last piece, what ended the text.
    """

    text: str
    ids: tuple[int, ...]
    logprob: float | None = None
    top_logprobs: TopLogprobs = ()
    stopped_by: StoppedBy | None = None


@dataclass(frozen=True)
class Generation:
    """What a model wrote.

    Args:
        text: the new text, without the prompt, and up to a stop string.
        ids: the new tokens, those of a stop string and an end token among them.
        stopped_by: "length", "stop" (a stop string) or "end" (an end token).
        prompt_ids: the tokens that were read before.
        logprobs: of each new token, if the settings ask for them.
        top_logprobs: for each new token the likeliest and theirs, if the settings ask for them.
    """

    text: str
    ids: list[int]
    stopped_by: StoppedBy
    prompt_ids: list[int]
    logprobs: list[float] | None = None
    top_logprobs: list[TopLogprobs] | None = None

    @classmethod
    def of(cls, pieces: Sequence[Piece], prompt_ids: list[int], sampling: Sampling) -> Generation:
        """Put pieces together.

        Example:
            >>> pieces = [Piece("a", (1,)), Piece("b", (2,), stopped_by="length")]
            >>> Generation.of(pieces, [], Sampling()).text
            'ab'
        """
        wanted = sampling.top_logprobs
        logprobs = [piece.logprob for piece in pieces if piece.logprob is not None]
        return cls(
            text="".join(piece.text for piece in pieces),
            ids=[id for piece in pieces for id in piece.ids],
            stopped_by=pieces[-1].stopped_by or "length",
            prompt_ids=prompt_ids,
            logprobs=None if wanted is None else logprobs,
            top_logprobs=[piece.top_logprobs for piece in pieces] if wanted else None,
        )


class Writer:
    """Chooses the tokens of one text, and says when it ends.

    Args:
        sampler: chooses.
        detokenize: makes text of tokens.
        end_ids: the tokens that end a text; they have no text.
    """

    def __init__(
        self,
        sampler: Sampler,
        detokenize: Callable[[Sequence[int]], str],
        end_ids: Collection[int],
    ) -> None:
        self.stopped_by: StoppedBy | None = None
        self._sampler = sampler
        self._stream = TextStream(detokenize, sampler.sampling.stop)
        self._end_ids = {*end_ids, *sampler.sampling.stop_ids}
        self._left = sampler.sampling.max_new_tokens

    def write(self, logits_v: np.ndarray) -> Piece:
        """Choose the next token by the logits after all before it."""
        chosen = self._sampler.next(logits_v)
        self._left -= 1
        ended = chosen.id in self._end_ids
        text = "" if ended else self._stream.add(chosen.id)
        if ended:
            self.stopped_by = "end"
        elif self._left == 0 and self._stream.stopped_by is None:
            self.stopped_by = "length"
        if self.stopped_by is not None:
            text += self._stream.finish()
        if self._stream.stopped_by is not None:  # finishing may show one too
            self.stopped_by = "stop"
        return Piece(text, (chosen.id,), chosen.logprob, chosen.top, self.stopped_by)


def write_text(
    network: Network, blocks: Blocks, writer: Writer, keep: bool
) -> Generator[Piece, None, None]:
    """Write one text.

    Args:
        network: the model.
        blocks: one text that was read, with its logits; advanced in place.
        writer: chooses.
        keep: whether `blocks` are used afterwards, and so have to have read all that was given
            out, however this ends: also where the caller stops listening, or presses Ctrl-C.

    Yields:
        A piece for each token.
    """
    read = int(blocks.counts[0])
    chosen = np.empty(0, np.int64)
    try:
        while writer.stopped_by is None:
            assert blocks.logits is not None
            piece = writer.write(blocks.logits[0])
            chosen, read = np.array(piece.ids), read + 1
            yield piece
            if piece.stopped_by is None:
                network.step(blocks, chosen)
    finally:
        if keep and blocks.counts[0] < read:
            network.step(blocks, chosen)


def write_batch(network: Network, blocks: Blocks, writers: Sequence[Writer]) -> list[list[Piece]]:
    """Write several texts side by side; those that have ended cost no more.

    Args:
        network: the model.
        blocks: a text that was read for each writer, with its logits; used up.
        writers: choose.

    Returns:
        The pieces of each text.
    """
    pieces: list[list[Piece]] = [[] for _ in writers]
    rows = list(range(len(writers)))
    while rows:
        assert blocks.logits is not None
        for place, row in enumerate(rows):
            pieces[row].append(writers[row].write(blocks.logits[place]))
        going = [place for place, row in enumerate(rows) if writers[row].stopped_by is None]
        if len(going) < len(rows):
            blocks, rows = blocks.take(going), [rows[place] for place in going]
        if rows:
            network.step(blocks, np.array([pieces[row][-1].ids[0] for row in rows]))
    return pieces
