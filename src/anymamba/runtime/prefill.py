"""Reading texts of any length, in chunks, so that memory does not grow with them.

Where the chunks begin and end is decided for each text by itself: beside others it is read in
the same steps as alone. Short texts share a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from anymamba.runtime.network import CHUNK_TOKENS, Network
from anymamba.runtime.state import BatchState

Progress = Callable[[int, int], object]
"""Called after each chunk with how many tokens were read, and how many there are."""

_MOST_LOGITS = 1 << 23  # numbers, 32 MB


def read_texts(
    network: Network,
    blocks: BatchState,
    sequences: Sequence[NDArray[np.int64]],
    progress: Progress | None = None,
) -> None:
    """Let each text read its tokens. Between two chunks `blocks` are what they say.

    Raises:
        InputError: a token is not in the vocabulary; then nothing was read.
        CheckpointError: the model's weights hold NaN or infinity, which the texts met.
    """
    for ids in sequences:
        network.check_tokens(ids)
    read, total = 0, sum(ids.size for ids in sequences)
    left = list(sequences)
    while read < total:
        chunk = next_parts(left)
        network.advance(blocks, range(blocks.rows), chunk)
        left = [ids[part.size :] for ids, part in zip(left, chunk, strict=True)]
        read += sum(part.size for part in chunk)
        if progress is not None:
            progress(read, total)
    for logits_v in blocks.logits:
        if logits_v is not None:
            network.check_numbers(logits_v)


def read_with_logits(
    network: Network, blocks: BatchState, ids_l: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Let one text read its tokens, and give out the logits after each of them.

    Yields:
        The tokens of a chunk, and their logits (w, v); so few at a time that the logits of a
        long text are never there together.

    Raises:
        InputError: a token is not in the vocabulary; then nothing was read.
    """
    network.check_tokens(ids_l)
    length = most_with_logits(network)
    for start in range(0, ids_l.size, length):
        part_w = ids_l[start : start + length]
        yield part_w, network.read_all(blocks, part_w)


def most_with_logits(network: Network) -> int:
    """How many tokens are read in a step where the logits after each of them are wanted."""
    return max(1, min(CHUNK_TOKENS, _MOST_LOGITS // int(network.vocabulary)))


def all_logits(
    network: Network, blocks: BatchState, ids_l: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Let one text read its tokens, and return the logits (l, v) after each of them."""
    logits_lv = np.empty((ids_l.size, network.vocabulary), np.float32)
    start = 0
    for part_w, logits_wv in read_with_logits(network, blocks, ids_l):
        logits_lv[start : start + part_w.size] = logits_wv
        start += part_w.size
    return logits_lv


def next_parts(
    left: Sequence[NDArray[np.int64]], room: int = CHUNK_TOKENS
) -> list[NDArray[np.int64]]:
    """What each text reads next of what is left: nothing where its part finds no room.

    Example:
        >>> [part.size for part in next_parts([np.arange(400), np.arange(600), np.arange(9)])]
        [400, 0, 9]
    """
    most, parts = room, []
    for ids in left:
        part = ids[:most]
        part = part if part.size <= room else part[:0]
        room -= part.size
        parts.append(part)
    return parts
