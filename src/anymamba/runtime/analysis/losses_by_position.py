"""How much context helps: a model's loss by how many tokens it has read before.

A text is read in windows, each from an empty state, and the losses are averaged by position: with
1 token before, with 2 to 3, with 4 to 7, and so on in doublings. Where windows begin more often
than they end (`stride` below `window`), each token is predicted with many lengths of context, so
that the rows compare the same tokens and small gains show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from anymamba.errors import InputError

if TYPE_CHECKING:
    from anymamba.runtime.engine import Engine


@dataclass(frozen=True)
class Stretch:
    """The loss with so many tokens of context.

    Args:
        first: the least number of tokens before the one that is predicted.
        last: the most of them.
        tokens: how many predictions these are.
        nats_per_token: their loss on average.
        error: its standard error, over parts of the text as long as a window; None of one part.
        gain: how much less the loss is than with the context of the stretch before, in the same
            parts of the text; None of the first stretch.
        gain_error: the gain's standard error; None of one part.
    """

    first: int
    last: int
    tokens: int
    nats_per_token: float
    error: float | None
    gain: float | None
    gain_error: float | None


def loss_by_position(
    engine: Engine,
    ids: Sequence[int],
    window: int,
    stride: int | None = None,
    before: Sequence[int] = (),
    progress: Callable[[int, int], object] | None = None,
) -> list[Stretch]:
    """Average a model's loss by position in windows.

    Args:
        engine: the model.
        ids: the text's tokens, without special ones.
        window: how many tokens are read from an empty state.
        stride: how far it is from one window's beginning to the next; by default `window`.
        before: tokens put before each window, as those that begin a text. They are not counted.
        progress: told how many windows were read, and how many there are.

    Returns:
        The stretches, from little context to much. What is left of the text behind its last whole
        part of `window` tokens does not count, nor, where windows overlap, does its first part.

    Raises:
        InputError: the text is too short, or there are no such windows.

    Example:
        >>> import anymamba
        >>> engine = anymamba.load()
        >>> ids = engine.tokenize("To be, or not to be: that is the question.")
        >>> [(part.first, part.last) for part in loss_by_position(engine, ids, 16)]
        [(1, 1), (2, 3), (4, 7), (8, 15)]
    """
    stride = window if stride is None else stride
    parts = len(ids) // window if window > 0 else 0
    _check(len(ids), window, stride, parts)
    starts = range(0, parts * window, stride)
    edges = _edges(window, 0 if before else 1)
    sums = np.zeros((2, parts, len(edges) - 1))  # of losses, and of predictions
    for count, start in enumerate(starts, start=1):
        losses = -engine.score([*before, *ids[start : start + window]]).logprobs
        length = min(window, len(ids) - start)
        contexts = np.arange(max(0, length - losses.size), length)
        losses = losses[losses.size - contexts.size :]
        # Each counts in the part of the text where its token is, and by its context.
        part_of = (start + contexts) // window
        inside = part_of < parts
        place = part_of[inside], np.searchsorted(edges, contexts[inside], side="right") - 1
        np.add.at(sums[0], place, losses[inside])
        np.add.at(sums[1], place, 1)
        if progress is not None:
            progress(count, len(starts))
    return _stretches(sums if stride == window else sums[:, 1:], edges)


def helpful_context(stretches: Sequence[Stretch]) -> int:
    """The most context that still helps: where the last gain of two standard errors ends.

    Args:
        stretches: what `loss_by_position` returned.

    Returns:
        How many tokens of context those predictions had at most; 0 if no gain is that sure.

    Example:
        >>> few = Stretch(1, 1, 9, 2.0, 0.1, None, None)
        >>> more = Stretch(2, 3, 18, 1.5, 0.1, 0.5, 0.1)
        >>> most = Stretch(4, 7, 36, 1.6, 0.1, -0.1, 0.1)
        >>> helpful_context([few, more, most])
        3
    """
    sure = [
        part.last
        for part in stretches
        if part.gain is not None and part.gain_error is not None and part.gain > 2 * part.gain_error
    ]
    return max(sure, default=0)


def _check(length: int, window: int, stride: int, parts: int) -> None:
    if window < 2 or not 1 <= stride <= window or window % stride:
        raise InputError(
            f"expected windows of at least 2 tokens that begin every so many tokens as divide "
            f"them, got a window of {window} and a stride of {stride}"
        )
    needed = window if stride == window else 2 * window
    if parts * window < needed:
        raise InputError(
            f"the text has {length} tokens, and windows of {window} need {needed}: take a longer "
            "text or a shorter window"
        )


def _edges(window: int, first: int) -> NDArray[np.int64]:
    """Where stretches of context begin, and where the last ends: 1, 2, 4, ..., `window`."""
    doublings = [2**power for power in range(math.ceil(math.log2(window)))]
    return np.array([*range(first, 1), *doublings, window])


def _stretches(sums: NDArray[np.float64], edges: NDArray[np.int64]) -> list[Stretch]:
    losses_pc = sums[0] / sums[1]  # by part and context
    gains_pc = losses_pc[:, :-1] - losses_pc[:, 1:]
    found = []
    for index in range(losses_pc.shape[1]):
        gain = None if index == 0 else float(gains_pc[:, index - 1].mean())
        gain_error = None if index == 0 else _error(gains_pc[:, index - 1])
        found.append(
            Stretch(
                first=int(edges[index]),
                last=int(edges[index + 1]) - 1,
                tokens=int(sums[1, :, index].sum()),
                nats_per_token=float(losses_pc[:, index].mean()),
                error=_error(losses_pc[:, index]),
                gain=gain,
                gain_error=gain_error,
            )
        )
    return found


def _error(values_p: NDArray[np.float64]) -> float | None:
    """The standard error of their mean."""
    count = values_p.size
    return None if count < 2 else float(values_p.std(ddof=1) / math.sqrt(count))
