"""Each step between logits and token, beside Transformers' own on the same logits."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import GenerationConfig, LogitsProcessorList, MambaConfig, MambaForCausalLM
from transformers.generation import logits_process as theirs

from anymamba.runtime.generation import logits_processors as ours
from anymamba.runtime.generation.sampling import Sampler, Sampling

# A float32 sum of at most 300 probabilities differs by less than this in another order.
SUM = 1e-5
# The last bits of a float32 exp, log or division.
LAST_BITS = 1e-6

SHARES = st.floats(0.01, 0.99)
# Eighths tie often, and keep differences of probabilities well above rounding.
LOGITS = st.lists(st.integers(-80, 80), min_size=1, max_size=300).map(
    lambda eighths: np.float32(eighths) / 8
)


def run_theirs(processor, scores_v, ids=()):
    """What a processor of Transformers makes of one row of scores."""
    ids = torch.tensor([list(ids)], dtype=torch.int64)
    return processor(ids, torch.from_numpy(scores_v.copy())[None])[0].numpy()


def kept_by(processor, scores_v):
    return np.isfinite(run_theirs(processor, scores_v))


def softmax(scores_v):
    weights_v = np.exp(np.float64(scores_v) - scores_v.max())
    return weights_v / weights_v.sum()


def with_holes(scores_v, share=3):
    """The scores with each third token made impossible, but not the first."""
    scores_v = scores_v.copy()
    scores_v[1::share] = -np.inf
    return scores_v


@given(LOGITS, st.integers(1, 400))
def test_top_k(scores_v, k):
    kept = ours.keep_top_k(scores_v, k)
    np.testing.assert_array_equal(kept, kept_by(theirs.TopKLogitsWarper(k), scores_v))


@given(LOGITS, SHARES)
def test_min_p(scores_v, p):
    relative = softmax(scores_v) / softmax(scores_v).max()
    assume(np.abs(relative - p).min() > LAST_BITS)
    kept = ours.keep_min_p(scores_v, p)
    np.testing.assert_array_equal(kept, kept_by(theirs.MinPLogitsWarper(p), scores_v))


@given(LOGITS, SHARES)
def test_top_p(scores_v, p):
    likeliest_first = np.sort(softmax(scores_v))[::-1]
    assume(np.abs(np.cumsum(likeliest_first) - p).min() > SUM)
    kept = ours.keep_top_p(scores_v, p)
    # Which of equal tokens stay is up to the sort, so that scores are compared, not tokens.
    expected = kept_by(theirs.TopPLogitsWarper(p), scores_v)
    np.testing.assert_array_equal(np.sort(scores_v[kept]), np.sort(scores_v[expected]))


@given(LOGITS, SHARES)
def test_top_p_prefers_the_smaller_of_equal_ids(scores_v, p):
    kept = ours.keep_top_p(scores_v, p)
    for score in np.unique(scores_v):
        equal = kept[scores_v == score]
        assert sorted(equal, reverse=True) == list(equal)


@given(LOGITS, SHARES)
def test_typical(scores_v, p):
    probabilities_v = softmax(scores_v)
    surprise_v = -np.log(probabilities_v)
    distance_v = np.abs(surprise_v - (probabilities_v * surprise_v).sum())
    distances = np.unique(distance_v)
    # Where two tokens are as near as rounding can tell, or the sum ends on p, either may be right.
    assume(distances.size == 1 or np.diff(distances).min() > SUM)
    mass = np.cumsum(probabilities_v[np.argsort(distance_v)])
    assume(np.abs(mass - p).min() > SUM)
    same = theirs.TypicalLogitsWarper(p)
    np.testing.assert_array_equal(ours.keep_typical(scores_v, p), kept_by(same, scores_v))


@pytest.mark.parametrize("size", [1, 2, 61, 50280])
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize(
    ("keep", "warper", "amount"),
    [
        (ours.keep_top_k, theirs.TopKLogitsWarper, 50),
        (ours.keep_top_p, theirs.TopPLogitsWarper, 0.9),
        (ours.keep_min_p, theirs.MinPLogitsWarper, 0.02),
        (ours.keep_typical, theirs.TypicalLogitsWarper, 0.9),
    ],
)
def test_vocabularies_of_real_size_and_impossible_tokens(keep, warper, amount, size, holes):
    scores_v = np.random.default_rng(size).normal(0, 3, size).astype(np.float32)
    scores_v = with_holes(scores_v) if holes else scores_v
    kept, expected = keep(scores_v, amount), kept_by(warper(amount), scores_v)
    possible = np.isfinite(scores_v)
    # The sums of 50,280 float32 numbers differ at the border by a few tokens of 1e-6 each.
    allowed = 20 if size > 1000 and warper not in (theirs.TopKLogitsWarper,) else 0
    assert np.count_nonzero((kept & possible) != expected) <= allowed
    assert kept[scores_v.argmax()] or keep is ours.keep_typical
    assert kept[possible].any()


@given(LOGITS, st.floats(0.05, 20))
def test_temperature(scores_v, temperature):
    scores_v = with_holes(scores_v)
    expected = run_theirs(theirs.TemperatureLogitsWarper(float(temperature)), scores_v)
    actual = ours.with_temperature(scores_v, float(temperature))
    # Theirs divides before the largest is taken away: its rounding is that of up to 10/0.05.
    np.testing.assert_allclose(softmax(actual), softmax(expected), atol=LAST_BITS * 200)


@given(LOGITS, st.floats(0.1, 10), st.data())
def test_repetition_penalty(scores_v, penalty, data):
    scores_v = with_holes(scores_v)
    ids = data.draw(st.lists(st.integers(0, scores_v.size - 1), min_size=1))
    processor = theirs.RepetitionPenaltyLogitsProcessor(float(penalty))
    expected = run_theirs(processor, scores_v, ids)
    ours.penalize_repetition(scores_v, np.unique(ids), float(penalty))
    np.testing.assert_array_equal(scores_v, expected)


@given(LOGITS, st.data())
def test_bias(scores_v, data):
    scores_v = with_holes(scores_v)
    ids = st.integers(0, scores_v.size - 1)
    bias = data.draw(st.dictionaries(ids, st.floats(-100, 100), min_size=1))
    processor = theirs.SequenceBiasLogitsProcessor({(id,): value for id, value in bias.items()})
    expected = run_theirs(processor, scores_v)
    ours.add_bias(scores_v, np.array(list(bias)), np.float32(list(bias.values())))
    np.testing.assert_array_equal(scores_v, expected)


@given(LOGITS, st.floats(-2, 2), st.floats(-2, 2), st.data())
def test_presence_and_frequency_penalties(scores_v, presence, frequency, data):
    """Transformers has neither: OpenAI's definition, token by token."""
    chosen = data.draw(st.lists(st.integers(0, scores_v.size - 1)))
    counts = Counter(chosen)
    expected = [
        float(score) - counts[id] * frequency - (1 if counts[id] > 0 else 0) * presence
        for id, score in enumerate(scores_v)
    ]
    ids, amounts = np.unique(np.array(chosen, dtype=np.int64), return_counts=True)
    ours.penalize_presence_and_frequency(scores_v, ids, amounts, presence, frequency)
    np.testing.assert_allclose(scores_v, expected, rtol=LAST_BITS, atol=LAST_BITS * 10)


@given(LOGITS)
def test_log_normalizer(scores_v):
    scores_v = with_holes(scores_v)
    actual = scores_v - ours.log_normalizer(scores_v)
    expected = torch.from_numpy(scores_v).double().log_softmax(0).numpy()
    # Scores are at most 10, the normalizer at most 10 + log 300: a few of its last bits.
    np.testing.assert_allclose(actual, expected, atol=1e-5)


PROMPT = [3, 3, 17, 60]
EVERY_STEP = {
    "temperature": 0.7,
    "top_k": 30,
    "top_p": 0.9,
    "min_p": 0.01,
    "typical_p": 0.95,
    "repetition_penalty": 1.3,
}
BIAS = {5: 3.0, 17: -2.0, 20: 2.0}


def only_even(vocabulary):
    mask_v = np.arange(vocabulary) % 2 == 0
    return lambda ids, scores_v: mask_v


@pytest.fixture(scope="module")
def model():
    return MambaForCausalLM(MambaConfig(vocab_size=61, hidden_size=8, num_hidden_layers=1))


@pytest.mark.parametrize("left_out", [None, *EVERY_STEP, "logit_bias", "constraint"])
@pytest.mark.parametrize("seed", range(3))
def test_the_order_is_that_of_generate(model, left_out, seed):
    """All steps together give the distribution that `generate` of Transformers draws from."""
    steps = {name: value for name, value in EVERY_STEP.items() if name != left_out}
    bias = {} if left_out == "logit_bias" else BIAS
    constraint = None if left_out == "constraint" else only_even(61)
    config = GenerationConfig(do_sample=True, num_beams=1, **steps)
    config.top_k = steps.get("top_k", 0)
    config.sequence_bias = {(id,): value for id, value in bias.items()} or None
    config, _ = model._prepare_generation_config(config)  # fills in the defaults
    chain = model._get_logits_processor(
        generation_config=config,
        input_ids_seq_length=len(PROMPT),
        prefix_allowed_tokens_fn=constraint and (lambda batch, ids: list(range(0, 61, 2))),
        logits_processor=LogitsProcessorList(),
    )
    logits_v = np.random.default_rng(seed).normal(0, 2, 61).astype(np.float32)
    sampler = Sampler(Sampling(logit_bias=bias, constraint=constraint, **steps), PROMPT, 61)
    expected = softmax(run_theirs(chain, logits_v, PROMPT))
    np.testing.assert_allclose(sampler.probabilities(logits_v), expected, atol=LAST_BITS)


def test_the_order_matters_for_these_logits():
    """The test before this one would see it if the rules changed places."""
    changes = []
    for seed in range(3):
        logits_v = np.random.default_rng(seed).normal(0, 2, 61).astype(np.float32)
        sampler = Sampler(Sampling(**EVERY_STEP), PROMPT, 61)
        before = sampler.probabilities(logits_v)
        sampler._rules.reverse()
        changes.append(np.abs(sampler.probabilities(logits_v) - before).max())
    assert max(changes) > 1e-3
