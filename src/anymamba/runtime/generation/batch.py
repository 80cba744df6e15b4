"""Writing any number of texts side by side, of which any may come or go between two steps.

A step is one call of the native core: it reads a part of the prompts that are not read yet, and
the token that each of the other texts chose last. Then those that have read all they were given
choose their next token. Rows of the memory are used where they lie.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anymamba.errors import InputError
from anymamba.runtime.generation.token_generator import TokenGenerator, TokenOutput
from anymamba.runtime.network import Network
from anymamba.runtime.prefill import next_parts
from anymamba.runtime.state import BatchState


@dataclass
class _Text:
    """A text that is being written, and what it reads before it chooses its next token."""

    generator: TokenGenerator
    unread: NDArray[np.int64]
    has_chosen: bool = False


class Batch:
    """The texts that a model writes at present, one a row of its memory.

    Each comes out as it would by itself, whatever the others do.

    Args:
        network: the model.
        blocks: the rows' memory, advanced in place. Rows without a text stay as they are.

    Example:
        >>> import anymamba
        >>> from anymamba.runtime.state import BatchState
        >>> engine = anymamba.load()
        >>> batch = Batch(engine._network, BatchState.empty(engine._identity.sizes, 2))
        >>> ids = np.array(engine.tokenize("ROMEO:"))
        >>> batch.add(1, ids, engine._generator(anymamba.Sampling(max_new_tokens=2), ids, 0))
        >>> [(row, piece.ids) for _ in range(2) for row, piece in batch.step()], batch.rows
        ([(1, (10,)), (1, (73,))], [])
    """

    def __init__(self, network: Network, blocks: BatchState) -> None:
        self._network = network
        self._blocks = blocks
        self._texts: dict[int, _Text] = {}

    @property
    def rows(self) -> list[int]:
        """The rows whose texts have not ended, in the order in which they came."""
        return list(self._texts)

    def add(self, row: int, ids: NDArray[np.int64], generator: TokenGenerator) -> None:
        """Let a row write, from what its memory holds on.

        Args:
            row: one that writes no text.
            ids: (l,) what it reads first; nothing, where its logits are there already.
            generator: chooses its tokens.

        Raises:
            InputError: the row writes already or is none of the batch, or a token is not in the
                vocabulary.
        """
        if row in self._texts or not 0 <= row < self._blocks.rows:
            state = "writes a text already" if row in self._texts else "is not there"
            raise InputError(f"row {row} {state}, expected a free one of {self._blocks.rows}")
        self._network.check_tokens(ids)
        self._texts[row] = _Text(generator, ids)

    def step(self) -> list[tuple[int, TokenOutput]]:
        """Advance all texts by one call of the core.

        Returns:
            Each row that chose a token, and what it brings. A text that ends leaves the batch; the
            token that it chose last is not read.

        Raises:
            CheckpointError: the model's weights hold NaN or infinity, which a prompt met.
            InputError: what chooses tokens was given nothing to choose from.
        """
        self._advance()
        ready = [(row, text) for row, text in self._texts.items() if not text.unread.size]
        return [(row, self._choose(row, text)) for row, text in ready]

    def cancel(self, row: int) -> None:
        """Take a row's text out of the batch. Its memory has read what it has read."""
        del self._texts[row]

    def _advance(self) -> None:
        """Read what there is room for: each chosen token, and parts of the prompts."""
        texts = [(row, text) for row, text in self._texts.items() if text.unread.size]
        prompts = [text.unread for _, text in texts if not text.has_chosen]
        parts = iter(next_parts(prompts))
        reading = [(row, text.unread if text.has_chosen else next(parts)) for row, text in texts]
        self._network.advance(
            self._blocks, [row for row, _ in reading], [ids for _, ids in reading]
        )
        for row, part in reading:
            text = self._texts[row]
            text.unread = text.unread[part.size :]
            logits_v = self._blocks.logits[row]
            if not (text.has_chosen or text.unread.size) and logits_v is not None:
                self._network.check_numbers(logits_v)

    def _choose(self, row: int, text: _Text) -> TokenOutput:
        logits_v = self._blocks.logits[row]
        assert logits_v is not None
        piece = text.generator.write(logits_v)
        text.unread, text.has_chosen = np.array(piece.ids), True
        if piece.finish_reason is not None:
            self.cancel(row)
        return piece


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
            for _, piece in batch.step():
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
        for row, piece in batch.step():
            pieces[row].append(piece)
    return pieces
