"""Rows of a batch, cut from documents that lie one after the other.

A row is a window of the row of tokens. Where a document ends inside it, `seq_idx` changes: the
model's state restarts there, and nothing is predicted across. What each position should predict
comes with the row (`shift_labels`), because a window's last target lies outside of it.

Which rows come when depends on the seed and the row's number alone. So a run that goes on from a
checkpoint sees the rows that an uninterrupted one would, whatever happened in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from anymamba.errors import InputError
from anymamba.training.data.documents import TokenRow


class Rows(Dataset[dict[str, Tensor]]):
    """The rows of a training run, by number.

    Args:
        row: the documents.
        window: l, tokens a row.
        order: `random`, `shuffled` or `carried`, as in `Settings`.
        streams: rows of all processes' batches together; `carried` keeps row i, i + streams, ...
            next to each other in the text.
        count: how many rows the run has.
        seed: of their order.

    Raises:
        InputError: the documents are too short for the windows.
    """

    def __init__(
        self, row: TokenRow, window: int, order: str, streams: int, count: int, seed: int
    ) -> None:
        needed = (window + 1) * (streams if order == "carried" else 1)
        if len(row) < needed:
            raise InputError(
                f"there are {len(row):,} tokens to train on, and at least {needed:,} are needed: "
                "give more text, or a smaller window"
            )
        self._row, self._window, self._order = row, window, order
        self._streams, self._count, self._seed = streams, count, seed
        self._epoch_order = lru_cache(maxsize=2)(self._shuffle)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """Row `number`: `input_ids`, `shift_labels`, `seq_idx` and `begins`, each (l,) or a
        number; `begins` tells whether the state before it is empty."""
        if self._order == "random":
            place = np.random.default_rng((self._seed, number))
            return self._cut(int(place.integers(len(self._row) - self._window)), True)
        if self._order == "shuffled":
            # A new phase each time, so that no place is a window's beginning for ever.
            per_epoch = (len(self._row) - self._window) // self._window
            per_epoch = max(per_epoch, 1)
            phase, order = self._epoch_order(number // per_epoch, per_epoch)
            return self._cut(phase + int(order[number % per_epoch]) * self._window, True)
        stream, turn = number % self._streams, number // self._streams
        length = (len(self._row) - 1) // self._streams
        turn %= length // self._window
        return self._cut(stream * length + turn * self._window, turn == 0)

    def _shuffle(self, epoch: int, per_epoch: int) -> tuple[int, NDArray[np.int64]]:
        random = np.random.default_rng((self._seed, epoch))
        spare = len(self._row) - 1 - per_epoch * self._window
        return int(random.integers(max(spare, 0) + 1)), random.permutation(per_epoch)

    def _cut(self, start: int, begins: bool) -> dict[str, Tensor]:
        return {**cut(self._row, start, self._window), "begins": torch.tensor(begins)}


def cut(row: TokenRow, start: int, window: int) -> dict[str, Tensor]:
    """The window that begins at `start`: l tokens and what each should predict."""
    tokens = torch.from_numpy(row.tokens[start : start + window + 1].astype(np.int64))
    places = np.arange(start, start + len(tokens))
    document = torch.from_numpy(np.searchsorted(row.starts, places, side="right"))
    targets = torch.where(document[1:] == document[:-1], tokens[1:], -100)
    return {
        "input_ids": tokens[:-1],
        "shift_labels": targets,
        # Its first document's number is 0, so that equal rows are equal wherever they were.
        "seq_idx": document[:-1] - document[0],
    }


def windows_side_by_side(row: TokenRow, window: int, most: int | None = None) -> list[int]:
    """Where windows of an evaluation begin: side by side, or at most so many, spread evenly.

    A rest that fills no window is left out, as others do who evaluate in windows; documents
    shorter than a window are read whole.
    """
    starts = list(range(0, len(row) - window, window)) or [0]
    if most is None or most >= len(starts):
        return starts
    return [starts[index * len(starts) // most] for index in range(most)]


def collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows as a batch, (b, l). `seq_idx` is left out where every row is one document."""
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    # Transformers counts the targets where it sees both.
    batch["labels"] = batch["shift_labels"]
    if not bool(batch["seq_idx"].any()):
        del batch["seq_idx"]
    return batch
