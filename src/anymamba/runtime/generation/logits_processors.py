"""What is done to a row of logits before a token is chosen from it.

The first three functions change scores, in place; `with_temperature` makes new ones; the `keep_`
functions say which tokens remain possible, as a boolean mask. A token that is not possible has
the score minus infinity, and every function takes such scores. None of them looks at more than
its arguments, so that each can be held beside the same step of another implementation.

The letter v is the vocabulary, c those of its tokens that are looked at. Where a temperature or a
mask is asked for the largest score is finite, and a mask leaves at least one token.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from anymamba.errors import InputError

Scores = NDArray[np.float32]
Mask = NDArray[np.bool_]


def check_numbers(largest: Scores) -> None:
    """Refuse what a broken model says, by the largest logits of some rows.

    Raises:
        InputError: one is NaN or infinite.

    Example:
        >>> check_numbers(np.float32([1, 2]))
    """
    if np.isnan(largest).any() or (largest == np.inf).any():
        raise InputError(
            f"logits hold {largest.max()}, expected finite numbers: the model's weights are broken"
        )
    if (largest == -np.inf).any():
        raise InputError("logits are all minus infinity: no token has a chance")


def add_bias(scores_v: Scores, ids_c: NDArray[np.int64], bias_c: Scores) -> None:
    """Add a number to the scores of some tokens, each named once, in place.

    This is Transformers' `SequenceBiasLogitsProcessor` for sequences of one token, and `logit_bias`
    of OpenAI's interface.

    Example:
        >>> scores_v = np.float32([1, 2, 3])
        >>> add_bias(scores_v, np.array([0, 2]), np.float32([10, -1]))
        >>> scores_v.tolist()
        [11.0, 2.0, 2.0]
    """
    scores_v[ids_c] += bias_c


def penalize_repetition(scores_v: Scores, ids_c: NDArray[np.int64], penalty: float) -> None:
    """Divide positive scores of tokens that were there before, and multiply negative, in place.

    From CTRL (Keskar et al. 2019, arXiv:1909.05858, section 4.1), with the division of negative
    scores, which would reward them, made a multiplication, as in Transformers'
    `RepetitionPenaltyLogitsProcessor`. A penalty above 1 makes tokens less likely; each is named
    once.

    Example:
        >>> scores_v = np.float32([4, -1, 3])
        >>> penalize_repetition(scores_v, np.array([0, 1]), 2.0)
        >>> scores_v.tolist()
        [2.0, -2.0, 3.0]
    """
    scores_c = scores_v[ids_c]
    scores_v[ids_c] = np.where(scores_c < 0, scores_c * penalty, scores_c / penalty)


def penalize_presence_and_frequency(
    scores_v: Scores,
    ids_c: NDArray[np.int64],
    counts_c: NDArray[np.int64],
    presence: float,
    frequency: float,
) -> None:
    """Lower the scores of tokens that were chosen before, each named once, in place.

    OpenAI's definition (API reference, "Frequency and presence penalties"): from the logit of a
    token that was sampled c times, c * frequency is taken, and presence once if c > 0. Negative
    ones reward.

    Example:
        >>> scores_v = np.float32([4, 4, 4])
        >>> penalize_presence_and_frequency(scores_v, np.array([0, 2]), np.array([1, 3]), 1.0, 0.5)
        >>> scores_v.tolist()
        [2.5, 4.0, 1.5]
    """
    scores_v[ids_c] -= (counts_c * frequency + presence).astype(np.float32)


def with_temperature(scores_v: Scores, temperature: float) -> Scores:
    """Divide the scores by the temperature, above 0, after taking the largest from all of them.

    The distribution is that of Transformers' `TemperatureLogitsWarper`: a constant taken from all
    scores changes no probability. It keeps small temperatures from reaching infinity.

    Example:
        >>> with_temperature(np.float32([1, 2, 3]), 0.5).tolist()
        [-4.0, -2.0, 0.0]
    """
    scaled_v: Scores = scores_v - scores_v.max()
    scaled_v /= np.float32(temperature)
    return scaled_v


def keep_top_k(scores_c: Scores, k: int) -> Mask:
    """Keep the k tokens, at least 1, with the largest scores, and those that tie with the last.

    From Fan et al. 2018 (arXiv:1805.04833, section 5.3); ties stay as in Transformers'
    `TopKLogitsWarper`. Nothing is sorted: the k-th score is found by partition.

    Example:
        >>> keep_top_k(np.float32([1, 4, 3, 3]), 2).tolist()
        [False, True, True, True]
    """
    at = scores_c.size - k
    if at <= 0:
        return np.ones(scores_c.shape, dtype=np.bool_)
    keep_c: Mask = scores_c >= np.partition(scores_c, at)[at]
    return keep_c


def keep_top_p(scores_c: Scores, p: float) -> Mask:
    """Keep the likeliest tokens that together reach the probability p, in (0, 1): the nucleus.

    From Holtzman et al. 2019 (arXiv:1904.09751, section 3.1). A token stays if all likelier ones
    together have less than p; Transformers' `TopPLogitsWarper` says the same from the other end. Of
    tokens that are equally likely, those with the smaller ids are kept first.

    Only candidates are sorted. All tokens below (1 - p) / v together have no more than 1 - p, so
    that those above reach p without them.

    Example:
        >>> keep_top_p(np.log(np.float32([0.1, 0.5, 0.25, 0.15])), 0.7).tolist()
        [False, True, True, False]
    """
    probabilities_c = _probabilities(scores_c)
    threshold = min((1 - p) / scores_c.size, probabilities_c.max())
    candidates = probabilities_c[probabilities_c >= threshold]
    likeliest_first = np.sort(candidates)[::-1].astype(np.float64)
    # What is likelier than the second, the third and so on; the first always stays.
    likelier = np.cumsum(likeliest_first)[:-1]
    n_kept = 1 + int(np.searchsorted(likelier, p))
    last = likeliest_first[n_kept - 1]
    keep_c: Mask = probabilities_c > last
    equal = np.flatnonzero(probabilities_c == last)
    keep_c[equal[: n_kept - np.count_nonzero(keep_c)]] = True
    return keep_c


def keep_min_p(scores_c: Scores, p: float) -> Mask:
    """Keep the tokens that are at least p times, 0 to 1, as likely as the likeliest.

    From Nguyen et al. 2024 (arXiv:2407.01082, section 3); Transformers' `MinPLogitsWarper`.

    Example:
        >>> keep_min_p(np.log(np.float32([0.1, 0.5, 0.3, 0.1])), 0.5).tolist()
        [False, True, True, False]
    """
    keep_c: Mask = np.exp(scores_c - scores_c.max()) >= np.float32(p)
    return keep_c


def keep_typical(scores_c: Scores, p: float) -> Mask:
    """Keep the tokens of the most expected surprise, up to the probability p, in (0, 1).

    From Meister et al. 2022 (arXiv:2202.00666, section 3): a token's surprise is -log of its
    probability, and what is expected of it is the entropy. As in Transformers'
    `TypicalLogitsWarper`, the token that reaches p stays, and so do those that tie with it.

    Example:
        >>> keep_typical(np.log(np.float32([0.4, 0.3, 0.2, 0.1])), 0.4).tolist()
        [False, True, True, False]
    """
    surprise_c = log_normalizer(scores_c) - scores_c
    probabilities_c = np.exp(-surprise_c)
    # A token that cannot come adds 0 to the entropy, where 0 * inf would be no number.
    entropy = probabilities_c @ np.where(probabilities_c > 0, surprise_c, 0)
    distance_c = np.abs(surprise_c - entropy)
    nearest_first = np.argsort(distance_c)
    mass_c = np.cumsum(probabilities_c[nearest_first], dtype=np.float64)
    last = min(int(np.searchsorted(mass_c, p)), scores_c.size - 1)
    keep_c: Mask = distance_c <= distance_c[nearest_first[last]]
    return keep_c


def log_normalizer(scores_c: Scores) -> np.float32:
    """What is taken from scores to make log-probabilities of them: log of the sum of exp.

    The sum is made around the largest score, where it can neither overflow nor vanish.

    Example:
        >>> scores_c = np.log(np.float32([1, 3]))
        >>> np.exp(scores_c - log_normalizer(scores_c)).round(6).tolist()
        [0.25, 0.75]
    """
    largest = scores_c.max()
    return np.float32(largest + np.log(np.exp(scores_c - largest).sum()))


def likeliest(
    logits_v: Scores, normalizer: np.float32, count: int
) -> tuple[tuple[int, float], ...]:
    """The likeliest tokens and their log-probabilities, of equals those with lower numbers first.

    Example:
        >>> likeliest(np.float32([0, 2, 2]), np.float32(2), 2)
        ((1, 0.0), (2, 0.0))
    """
    if count == 0:
        return ()
    ids_c = np.flatnonzero(keep_top_k(logits_v, count))
    ids_c = ids_c[np.argsort(-logits_v[ids_c], kind="stable")][:count]
    logprobs_c = logits_v[ids_c] - normalizer
    return tuple(zip(ids_c.tolist(), logprobs_c.tolist(), strict=True))


def _probabilities(scores_c: Scores) -> Scores:
    weights_c: Scores = np.exp(scores_c - scores_c.max())
    weights_c /= weights_c.sum()
    return weights_c
