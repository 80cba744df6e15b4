"""Choosing the next token: the settings, and what applies them to one row of logits after another.

The steps come in the order of Transformers' `generate`: logit bias, repetition penalty, presence
and frequency penalties (which Transformers lacks), constraint; then, unless the likeliest token is
taken, temperature, top-k, top-p, min-p, typical. The steps themselves are in `logits_processors`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anymamba.checkpoint.io import shown
from anymamba.errors import InputError
from anymamba.runtime.generation.logits_processors import (
    add_bias,
    check_numbers,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    keep_typical,
    likeliest,
    log_normalizer,
    penalize_presence_and_frequency,
    penalize_repetition,
    with_temperature,
)
from anymamba.runtime.generation.sampling_settings import Constraint, Sampling
from anymamba.runtime.tokenizer import check_vocabulary


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token that was chosen.

    Log-probabilities are those of the model's own distribution, before bias, penalties,
    constraint, temperature and all else.

    Args:
        id: the token.
        logprob: its log-probability; None if the settings ask for none.
        top: the likeliest tokens with their log-probabilities, the likeliest first, of equals
            that with the smaller id; as many as the settings ask for.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses one token after another for one text, and remembers what it chose.

    A row of a batch has its own. Row i draws as a text of its own would with the seed
    `seed + i`, whatever the other rows do.

    Args:
        sampling: the settings.
        prompt_ids: the tokens before the first that is chosen.
        vocabulary: how many tokens the model has.
        row: which row of the batch this is.

    Raises:
        InputError: a token of the prompt or the settings is not in the vocabulary.

    Attributes:
        seed: what the drawing starts from, also if the settings gave none; without the row.

    Example:
        >>> sampler = Sampler(Sampling(repetition_penalty=10.0), [], 3)
        >>> [sampler.next(np.float32([1, 3, 2])).id for _ in range(3)]
        [1, 2, 0]
    """

    def __init__(
        self, sampling: Sampling, prompt_ids: Sequence[int], vocabulary: int, row: int = 0
    ) -> None:
        for where, ids in (
            ("prompt", prompt_ids),
            ("logit_bias", list(sampling.logit_bias)),
            ("stop_ids", sampling.stop_ids),
        ):
            check_vocabulary(np.array(ids, np.int64), vocabulary, where)
        self.sampling = sampling
        self.seed = random.getrandbits(32) if sampling.seed is None else sampling.seed
        self._vocabulary = vocabulary
        self._random = None if sampling.greedy else random.Random(self.seed + row)
        self._rules = [] if sampling.greedy else _rules(sampling)
        self._all_ids_v = np.arange(vocabulary)
        self._bias_ids = np.array(list(sampling.logit_bias), dtype=np.int64)
        self._bias = np.array(list(sampling.logit_bias.values()), dtype=np.float32)
        self._penalizes_choices = bool(sampling.presence_penalty or sampling.frequency_penalty)
        self._adjusts = bool(
            sampling.logit_bias
            or sampling.repetition_penalty != 1
            or self._penalizes_choices
            or sampling.constraint is not None
        )
        self._seen_v = np.zeros(vocabulary, dtype=np.bool_)
        self._seen_v[np.asarray(prompt_ids, dtype=np.int64)] = True
        self._chosen_v = np.zeros(vocabulary, dtype=np.bool_)
        self._counts_v = np.zeros(vocabulary, dtype=np.int64)
        self._new_ids: list[int] = []

    def next(self, logits_v: NDArray[np.float32]) -> Sampled:
        """Choose a token and remember it.

        Args:
            logits_v: the model's logits after all tokens so far, (vocabulary,) float32. They
                are not changed.

        Returns:
            The token, with its log-probabilities as far as the settings ask for them.

        Raises:
            InputError: the logits have another shape or type or hold NaN or infinity, no token
                has a chance, or the constraint returned no mask or one that allows no token.
        """
        self._check(logits_v)
        scores_v = self._adjusted(logits_v)
        if self._random is None:
            chosen = int(scores_v.argmax())
        else:
            ids_c, scores_c = self._candidates(scores_v)
            chosen = int(ids_c[_drawn(scores_c, self._random.random())])
        self._remember(chosen)
        return self._sampled(chosen, logits_v)

    def probabilities(self, logits_v: NDArray[np.float32]) -> NDArray[np.float64]:
        """With which probability `next` would choose each token. Nothing is chosen.

        Args:
            logits_v: as for `next`.

        Returns:
            (vocabulary,) probabilities after all steps. Greedy, all is on one token.

        Raises:
            InputError: as `next`.

        Example:
            >>> sampler = Sampler(Sampling(top_k=2), [], 3)
            >>> sampler.probabilities(np.log(np.float32([1, 2, 6]))).round(6).tolist()
            [0.0, 0.25, 0.75]
        """
        self._check(logits_v)
        scores_v = self._adjusted(logits_v)
        result_v = np.zeros(self._vocabulary)
        if self._random is None:
            result_v[scores_v.argmax()] = 1
        else:
            ids_c, scores_c = self._candidates(scores_v)
            weights_c = np.exp(scores_c, dtype=np.float64)
            result_v[ids_c] = weights_c / weights_c.sum()
        return result_v

    def _check(self, logits_v: NDArray[np.float32]) -> None:
        shape, dtype = (self._vocabulary,), getattr(logits_v, "dtype", None)
        if dtype != np.float32 or logits_v.shape != shape:
            found = f"{dtype} {logits_v.shape}" if dtype is not None else shown(logits_v)
            raise InputError(f"logits are {found}, expected an array of float32 {shape}")
        check_numbers(logits_v.max(keepdims=True))

    def _adjusted(self, logits_v: NDArray[np.float32]) -> NDArray[np.float32]:
        """The scores after bias, penalties and constraint."""
        if not self._adjusts:
            return logits_v
        sampling, scores_v = self.sampling, logits_v.copy()
        if self._bias_ids.size:
            add_bias(scores_v, self._bias_ids, self._bias)
        if sampling.repetition_penalty != 1:
            seen_c = np.flatnonzero(self._seen_v)
            penalize_repetition(scores_v, seen_c, sampling.repetition_penalty)
        if self._penalizes_choices:
            ids_c = np.flatnonzero(self._chosen_v)
            penalize_presence_and_frequency(
                scores_v,
                ids_c,
                self._counts_v[ids_c],
                sampling.presence_penalty,
                sampling.frequency_penalty,
            )
        if sampling.constraint is not None:
            self._constrain(scores_v, sampling.constraint)
        return scores_v

    def _constrain(self, scores_v: NDArray[np.float32], constraint: Constraint) -> None:
        seen_by_constraint = scores_v.view()
        seen_by_constraint.flags.writeable = False
        allowed_v = np.asarray(constraint(self._new_ids, seen_by_constraint))
        if allowed_v.dtype != np.bool_ or allowed_v.shape != scores_v.shape:
            raise InputError(
                f"constraint returned {allowed_v.dtype} {allowed_v.shape}, expected a boolean "
                f"mask of the vocabulary, bool {scores_v.shape}"
            )
        scores_v[~allowed_v] = -np.inf
        if scores_v.max() == -np.inf:
            raise InputError(
                f"constraint allows no token after {len(self._new_ids)} new ones, expected at "
                "least one: at the end of what it describes, let it allow an end token"
            )

    def _candidates(
        self, scores_v: NDArray[np.float32]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The tokens to draw from, in order of their ids, and their scores, the largest 0."""
        temperature = self.sampling.temperature
        ids_c, scores_c = self._all_ids_v, with_temperature(scores_v, temperature or 1.0)
        for keep, amount in self._rules:
            keep_c = keep(scores_c, amount)
            ids_c, scores_c = ids_c[keep_c], scores_c[keep_c]
        return ids_c, scores_c

    def _remember(self, chosen: int) -> None:
        self._seen_v[chosen] = True
        self._chosen_v[chosen] = True
        self._counts_v[chosen] += 1
        if self.sampling.constraint is not None:
            self._new_ids.append(chosen)

    def _sampled(self, chosen: int, logits_v: NDArray[np.float32]) -> Sampled:
        wanted = self.sampling.top_logprobs
        if wanted is None:
            return Sampled(chosen)
        normalizer = log_normalizer(logits_v)
        logprob = float(logits_v[chosen] - normalizer)
        return Sampled(chosen, logprob, likeliest(logits_v, normalizer, wanted))


def _rules(sampling: Sampling) -> list[tuple[Callable[[Any, Any], NDArray[np.bool_]], float]]:
    """What restricts the candidates, in order, without what changes nothing."""
    rules = [
        (keep_top_k, sampling.top_k, 0),
        (keep_top_p, sampling.top_p, 1),
        (keep_min_p, sampling.min_p, 0),
        (keep_typical, sampling.typical_p, 1),
    ]
    return [(keep, amount) for keep, amount, off in rules if amount is not None and amount != off]


def _drawn(scores_c: NDArray[np.float32], chance: float) -> int:
    """The index that a number of [0, 1) falls on, if each has a share of it as by its score."""
    shares_c = np.cumsum(np.exp(scores_c), dtype=np.float64)
    # The product is below the end, and "right" passes over tokens that have no share.
    return int(np.searchsorted(shares_c, chance * shares_c[-1], side="right"))
