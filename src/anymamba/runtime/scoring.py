"""How well a model predicts a text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anymamba.runtime.generation import check_numbers
from anymamba.runtime.network import Network
from anymamba.runtime.prefill import read_with_logits
from anymamba.runtime.state import BatchState


@dataclass(frozen=True)
class Score:
    """The log-probabilities of a text's tokens, each given all before it.

    Args:
        ids: the text's tokens.
        logprobs: natural logarithms of the probabilities of the last tokens of `ids`: of all but
            the first, which nothing predicts unless the text continues a state.

    Example:
        >>> score = Score([3, 1, 2], np.log([0.5, 0.125]))
        >>> score.nats, score.perplexity
        (2.772588722239781, 4.0)
    """

    ids: list[int]
    logprobs: NDArray[np.floating]

    @property
    def nats(self) -> float:
        """The text's negative log-probability."""
        return -float(np.sum(self.logprobs, dtype=np.float64)) + 0.0  # no -0.0

    @property
    def perplexity(self) -> float:
        """Among how many equally likely tokens each would be chosen; NaN where none was."""
        return perplexity_of(self.nats / self.logprobs.size) if self.logprobs.size else math.nan


def perplexity_of(nats: float) -> float:
    """Among how many equally likely choices one is as surprising; infinite beyond all floats.

    Example:
        >>> perplexity_of(0.0), perplexity_of(1000.0)
        (1.0, inf)
    """
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def score_ids(network: Network, blocks: BatchState, ids_l: NDArray[np.int64]) -> Score:
    """Score tokens that one text reads, in constant memory beside their log-probabilities.

    Raises:
        InputError: a token is not in the vocabulary; then nothing was read.
        CheckpointError: the model's weights hold NaN or infinity, which the text met.
    """
    logprobs = []
    before_v = blocks.logits[0]
    for part_w, logits_wv in read_with_logits(network, blocks, ids_l):
        if before_v is not None:
            logprobs.append(_logprobs_of(before_v[None], part_w[:1]))
        before_v = logits_wv[-1].copy()
        network.check_numbers(logits_wv)
        logprobs.append(_logprobs_of(logits_wv[:-1], part_w[1:]))
    found = np.concatenate(logprobs) if logprobs else np.empty(0)
    return Score(ids_l.tolist(), found)


def _logprobs_of(logits_wv: NDArray[np.float32], ids_w: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of one token for each row of logits, which are overwritten."""
    largest_w1 = logits_wv.max(axis=1, keepdims=True) if len(logits_wv) else logits_wv[:, :1]
    check_numbers(largest_w1)
    logits_wv -= largest_w1
    chosen_w = logits_wv[np.arange(len(ids_w)), ids_w].astype(np.float64)
    np.exp(logits_wv, out=logits_wv)
    chosen_w -= np.log(logits_wv.sum(axis=1, dtype=np.float64))
    return chosen_w
