"""Writing any number of texts side by side, of which any may come or go between two steps.

A step is one call of the native core: it reads a part of the prompts that are not read yet, and
the token that each of the other texts chose last. Then those that have read all they were given
choose their next token. Rows of the memory are used where they lie.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from anymamba.errors import InputError, StateError
from anymamba.runtime.generation.pooling import Pooling
from anymamba.runtime.generation.prompt_scores import PromptScores
from anymamba.runtime.generation.token_generator import TokenGenerator, TokenOutput
from anymamba.runtime.network import CHUNK_TOKENS, Network
from anymamba.runtime.prefill import most_with_logits, next_parts
from anymamba.runtime.state import BatchState

_EMBEDDED_ROWS = 16
"""How many texts become vectors side by side: short ones share a call of the core."""


@dataclass
class _Text:
    """A text that is being written, and what it reads before it chooses its next token."""

    generator: TokenGenerator | Pooling | None
    unread: NDArray[np.int64]
    pauses: list[int]
    goes_on: bool
    scores: PromptScores | None = None
    has_chosen: bool = False


@dataclass(frozen=True, eq=False)
class Embedding:
    """The vector (d,) of a text."""

    vector_d: NDArray[np.float32]


Outcome: TypeAlias = TokenOutput | Embedding | Exception | None
"""What a step brings a text: a token; the vector of one that becomes a vector; None for one that
had only to read, and has; or why its next token could not be chosen."""


class Batch:
    """The texts that a model writes at present, one a row of its memory.

    Each comes out as it would by itself, whatever the others do.

    Args:
        network: the model.
        blocks: the rows' memory, advanced in place. Rows without a text stay as they are.
        chunk_tokens: how much of their prompts the texts read in a step, all together. Fewer let
            other texts wait less for their next token, and read a long prompt more slowly.

    Example:
        >>> import anymamba
        >>> engine = anymamba.load()
        >>> batch, ids = engine.batch(rows=2), engine.prompt_ids("ROMEO:")
        >>> batch.add(1, ids, engine.token_generator(ids, anymamba.Sampling(max_new_tokens=2)))
        >>> [(row, piece.ids) for _ in range(2) for row, piece in batch.step()], batch.rows
        ([(1, (10,)), (1, (73,))], [])
    """

    def __init__(
        self, network: Network, blocks: BatchState, chunk_tokens: int = CHUNK_TOKENS
    ) -> None:
        self.blocks = blocks
        self._network = network
        self._chunk_tokens = chunk_tokens
        self._texts: dict[int, _Text] = {}
        self._is_short_turn = False

    @property
    def rows(self) -> list[int]:
        """The rows whose texts have not ended."""
        return list(self._texts)

    def check_tokens(self, ids: NDArray[np.int64]) -> None:
        """Refuse tokens that the model does not have.

        Raises:
            InputError: one is not in the vocabulary.
        """
        self._network.check_tokens(ids)

    def add(
        self,
        row: int,
        ids: NDArray[np.int64],
        generator: TokenGenerator | Pooling | None,
        pauses: Collection[int] = (),
        scores: PromptScores | None = None,
    ) -> None:
        """Let a row write, from what its memory holds on.

        Args:
            row: one that writes no text.
            ids: (l,) what it reads first; nothing, where its logits are there already.
            generator: chooses its tokens; a pooling for a text that becomes a vector; None for
                one that is only read.
            pauses: counts of tokens of `ids` after which a step ends, so that the row's memory can
                be copied as it is there.
            scores: gets the log-probabilities of the tokens of `ids`, which takes longer.

        Raises:
            InputError: the row writes already or is not in the batch, a token is not in the
                vocabulary, or there is none to make a vector of.
        """
        if row in self._texts or not 0 <= row < self.blocks.rows:
            state = "writes a text already" if row in self._texts else "is not there"
            raise InputError(f"row {row} {state}, expected a free one of {self.blocks.rows}")
        self.check_tokens(ids)
        left = sorted(ids.size - pause for pause in pauses if 0 < pause < ids.size)
        if isinstance(generator, Pooling) and not ids.size:
            raise InputError("there is no text to make a vector of: give one token or more")
        goes_on = bool(self.blocks.counts[row])
        self._texts[row] = _Text(generator, ids, left, goes_on, scores)

    def step(self) -> list[tuple[int, Outcome]]:
        """Advance all texts by one call of the core.

        Returns:
            The rows that have read all they were given, and what that brings. A text that ends
            leaves the batch; the token that it chose last is not read.
        """
        self._advance()
        ready = [(row, text) for row, text in self._texts.items() if not text.unread.size]
        return [(row, self._choose(row, text)) for row, text in ready]

    def cancel(self, row: int) -> None:
        """Take a row's text out of the batch. Its memory has read what it has read."""
        del self._texts[row]

    def _advance(self) -> None:
        """Read each chosen token, and of the prompts what there is room for."""
        prompts = [
            row for row, text in self._texts.items() if text.unread.size and not text.has_chosen
        ]
        parts = {row: text.unread for row, text in self._texts.items() if text.has_chosen}
        if prompts:
            parts |= self._prompt_parts(prompts)
        pooled = {row: ids for row, ids in parts.items() if self._pooling(row) is not None}
        scored = [row for row in prompts if self._texts[row].scores is not None]
        others = {row: ids for row, ids in parts.items() if row not in pooled and row not in scored}
        self._network.advance(self.blocks, [*others], [*others.values()])
        if pooled:
            self._pool(pooled)
        for row in scored:
            parts[row] = self._score(row, parts[row])
        for row, part in parts.items():
            text = self._texts[row]
            text.unread = text.unread[part.size :]
        for row in prompts:
            if self._texts[row].unread.size and parts[row].size:
                self._texts[row] = self._texts.pop(row)  # next time others come first
                if (logits_v := self.blocks.logits[row]) is not None:
                    # It may wait for many steps, and would keep the logits of all others in this.
                    self.blocks.logits[row] = logits_v.copy()

    def _prompt_parts(self, prompts: Sequence[int]) -> dict[int, NDArray[np.int64]]:
        """What is read of prompts. Short ones come first in every other step, and alone.

        So their first tokens wait for a step that runs, and not for a long prompt's next one, which
        still has half of the steps at least.
        """
        texts = {row: self._texts[row] for row in prompts}
        nothing = {row: text.unread[:0] for row, text in texts.items()}
        short = [row for row, text in texts.items() if text.unread.size <= self._chunk_tokens]
        self._is_short_turn = not self._is_short_turn and 0 < len(short) < len(prompts)
        if self._is_short_turn:
            prompts = sorted(short, key=lambda row: texts[row].unread.size)
        left = [self._until_pause(texts[row]) for row in prompts]
        return nothing | dict(zip(prompts, next_parts(left, self._chunk_tokens), strict=True))

    def _pooling(self, row: int) -> Pooling | None:
        generator = self._texts[row].generator
        return generator if isinstance(generator, Pooling) else None

    def _pool(self, parts: Mapping[int, NDArray[np.int64]]) -> None:
        """Let texts that become vectors read their parts."""
        hidden = self._network.read_hidden(self.blocks, [*parts], [*parts.values()])
        for row, hidden_ld in zip(parts, hidden, strict=True):
            pooling = self._pooling(row)
            if pooling is not None and len(hidden_ld):
                pooling.add(hidden_ld)

    def _score(self, row: int, part: NDArray[np.int64]) -> NDArray[np.int64]:
        """Let a text read a part, and find how likely its tokens are; return what it has read."""
        part, scores = part[: most_with_logits(self._network)], self._texts[row].scores
        if part.size and scores is not None:
            before_v = self.blocks.logits[row]
            scores.add(before_v, part, self._network.read_all(self.blocks, part, row))
        return part

    def _until_pause(self, text: _Text) -> NDArray[np.int64]:
        """What a text may read before its next pause."""
        while text.pauses and text.pauses[-1] >= text.unread.size:
            text.pauses.pop()
        return text.unread[: text.unread.size - text.pauses[-1]] if text.pauses else text.unread

    def _choose(self, row: int, text: _Text) -> Outcome:
        try:
            if isinstance(text.generator, Pooling):
                vector_d = text.generator.vector()
                self._network.check_numbers(np.abs(vector_d))
                self.cancel(row)
                return Embedding(vector_d)
            self._check_numbers(row, text)
            piece = None if text.generator is None else self._write(row, text.generator)
        except Exception as error:  # of this text, or of its constraint: the others go on
            self.cancel(row)
            return error
        if piece is None or piece.finish_reason is not None:
            self.cancel(row)
        if piece is not None:
            text.unread, text.has_chosen = np.array(piece.ids), True
        return piece

    def _write(self, row: int, generator: TokenGenerator) -> TokenOutput:
        logits_v = self.blocks.logits[row]
        if logits_v is None:
            raise StateError("the state does not say what comes next: give a token to read")
        return generator.write(logits_v)

    def _check_numbers(self, row: int, text: _Text) -> None:
        """Refuse what a text has read, unless a number can say what comes next."""
        logits_v = self.blocks.logits[row]
        if text.has_chosen or logits_v is None:
            return
        if text.goes_on and not np.isfinite(logits_v.max()):
            raise StateError(
                "the state leads to numbers beyond float32, so that nothing can go on from it: "
                "read its text again"
            )
        self._network.check_numbers(logits_v)


def write_text(
    network: Network,
    blocks: BatchState,
    ids: NDArray[np.int64],
    generator: TokenGenerator,
    keep: bool,
) -> Generator[TokenOutput, None, None]:
    """Let one text read its prompt and write on.

    Args:
        network: the model.
        blocks: the text's memory, advanced in place.
        ids: the prompt; it may be empty where the memory has logits.
        generator: chooses.
        keep: whether `blocks` are used afterwards, and so have to have read all that was given
            out, however this ends: also where the caller stops listening, or presses Ctrl-C.

    Yields:
        A piece for each token.
    """
    batch = Batch(network, blocks)
    batch.add(0, ids, generator)
    chosen, read = ids[:0], int(blocks.counts[0]) + ids.size
    try:
        while batch.rows:
            for _, outcome in batch.step():
                piece = _token(outcome)
                chosen, read = np.array(piece.ids), read + 1
                yield piece
    finally:
        if keep and chosen.size and blocks.counts[0] < read:
            network.advance(blocks, [0], [chosen])


def write_batch(
    network: Network,
    blocks: BatchState,
    prompts: Sequence[NDArray[np.int64]],
    generators: Sequence[TokenGenerator],
) -> list[list[TokenOutput]]:
    """Let each row of `blocks`, which are used up, read its prompt and write on."""
    batch = Batch(network, blocks)
    for row, (ids, generator) in enumerate(zip(prompts, generators, strict=True)):
        batch.add(row, ids, generator)
    pieces: list[list[TokenOutput]] = [[] for _ in prompts]
    while batch.rows:
        for row, outcome in batch.step():
            pieces[row].append(_token(outcome))
    return pieces


def embed_batch(
    network: Network,
    sizes: Mapping[str, str | int],
    texts: Sequence[NDArray[np.int64]],
    pooling: str,
    normalize: bool,
) -> NDArray[np.float32]:
    """Make a vector of each text, some of them side by side.

    Args:
        network: the model.
        sizes: its `state_identity`.
        texts: their tokens.
        pooling, normalize: as `Pooling` has them.

    Returns:
        (b, d) float32.

    Raises:
        InputError: a text is empty, or there is no such pooling or token.
    """
    rows = max(1, min(len(texts), _EMBEDDED_ROWS))
    vectors_bd = np.empty((len(texts), network.width), np.float32)
    for at in range(0, len(texts), rows):
        batch = Batch(network, BatchState.empty(sizes, rows))
        for row, ids in enumerate(texts[at : at + rows]):
            batch.add(row, ids, Pooling(pooling, normalize))
        while batch.rows:
            for row, outcome in batch.step():
                if isinstance(outcome, Exception):
                    raise outcome
                assert isinstance(outcome, Embedding)
                vectors_bd[at + row] = outcome.vector_d
    return vectors_bd


def _token(outcome: Outcome) -> TokenOutput:
    if isinstance(outcome, Exception):
        raise outcome
    assert isinstance(outcome, TokenOutput)
    return outcome
