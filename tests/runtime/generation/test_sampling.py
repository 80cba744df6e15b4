"""The settings, and choosing one token after another."""

import time
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from anymamba.errors import InputError
from anymamba.runtime.generation.sampling import Sampled, Sampler, Sampling

LOGITS = np.float32([0.5, 2, -1, 1.5, 2, 0])


def chosen(settings, logits_v=LOGITS, count=1, prompt=(), row=0):
    sampler = Sampler(Sampling(**settings), prompt, len(logits_v), row)
    return [sampler.next(logits_v).id for _ in range(count)]


WRONG = {
    "temperature": (-1, 1e-9, 1e9),
    "top_k": (-1, 2.0),
    "top_p": (0, 1.01),
    "min_p": (-0.1, 1.1),
    "typical_p": (0, 2),
    "repetition_penalty": (0, None),
    "presence_penalty": (1e9,),
    "frequency_penalty": (-1e9,),
    "logit_bias": ({-1: 0.0}, {1: 1e9}, {"1": 1.0}, [(1, 1.0)]),
    "seed": (-1, 1.5),
    "stop": (["a", ""], [1], None),
    "stop_ids": ([-1], ["a"]),
    "max_new_tokens": (0, None),
    "top_logprobs": (-1,),
    "do_sample": (0, "yes"),
    "constraint": ("a",),
}
NO_NUMBERS = ["1", True, float("nan"), float("inf"), -float("inf"), 1j, 10**400]
NUMERIC = [
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "seed", "max_new_tokens", "top_logprobs"),
]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name, values in WRONG.items() for value in values),
        *((name, value) for name in NUMERIC for value in NO_NUMBERS),
        *(("logit_bias", {1: value}) for value in NO_NUMBERS),
    ],
)
def test_a_setting_that_makes_no_sense_is_named_with_its_range(name, value):
    with pytest.raises(InputError, match=f"^{name} is .*, expected ") as raised:
        Sampling(**{name: value})
    assert len(str(raised.value)) < 300


def test_settings_are_of_python_types_and_do_not_change():
    bias, stop = {np.int64(3): np.float32(0.5)}, ["END"]
    settings = Sampling(temperature=np.float32(0.5), top_k=np.int32(4), logit_bias=bias, stop=stop)
    bias[4] = 1.0
    stop.append("more")
    assert type(settings.temperature) is float
    assert type(settings.top_k) is int
    assert settings.logit_bias == {3: 0.5}
    assert settings.stop == ("END",)
    with pytest.raises(FrozenInstanceError):
        settings.top_k = 5
    assert replace(settings, top_k=5).top_k == 5


def test_one_stop_string_or_id_needs_no_list():
    assert Sampling(stop="END", stop_ids=7) == Sampling(stop=["END"], stop_ids=[7])


@pytest.mark.parametrize(
    ("settings", "greedy"),
    [
        ({}, True),
        ({"seed": 1, "repetition_penalty": 1.2}, True),
        ({"do_sample": True}, False),
        ({"temperature": 0.8}, False),
        ({"top_k": 3}, False),
        ({"top_p": 0.9}, False),
        ({"min_p": 0.1}, False),
        ({"typical_p": 0.9}, False),
        ({"temperature": 0, "top_p": 0.9}, True),
        ({"temperature": 0, "do_sample": True}, True),
        ({"temperature": 0.8, "do_sample": False}, True),
    ],
)
def test_greedy(settings, greedy):
    assert Sampling(**settings).greedy is greedy
    some = set(chosen({"seed": 5, **settings}, np.zeros(50, np.float32), 10))
    # Ten draws among three tokens or more fall on one with probability 1e-4 at most.
    assert (len(some) == 1) is (greedy and "repetition_penalty" not in settings) or greedy


def test_greedy_takes_the_first_of_the_likeliest():
    assert chosen({}) == [1]


def test_draws_follow_the_probabilities():
    settings = Sampling(temperature=1.5, top_k=5, seed=0)
    sampler = Sampler(settings, [], len(LOGITS))
    n = 20_000
    counts_v = np.bincount([sampler.next(LOGITS).id for _ in range(n)], minlength=len(LOGITS))
    expected = np.exp(np.float64(LOGITS) / 1.5)
    expected[2] = 0  # the least likely is not among the five
    expected /= expected.sum()
    assert counts_v[2] == 0
    # Five standard deviations of a count: exceeded once in a million runs, and the seed is fixed.
    np.testing.assert_array_less(
        np.abs(counts_v - n * expected), 5 * np.sqrt(n * expected * (1 - expected)) + 1e-9
    )


@given(st.floats(0, 1, exclude_max=True))
@example(1 - 2**-53)
def test_no_chance_falls_on_an_impossible_token(chance):
    logits_v = np.float32([-np.inf, 0, -np.inf, -90, 1, -np.inf])
    sampler = Sampler(Sampling(temperature=1.0, seed=0), [], 6)
    sampler._random.random = lambda: chance
    assert sampler.next(logits_v).id in (1, 3, 4)


def test_a_seed_repeats_a_run_and_another_does_not():
    flat = np.zeros(1000, np.float32)
    first = chosen({"temperature": 1.0, "seed": 3}, flat, 8)
    assert chosen({"temperature": 1.0, "seed": 3}, flat, 8) == first
    assert chosen({"temperature": 1.0, "seed": 4}, flat, 8) != first
    # Of Python's generator, whose numbers stay what they are in every version.
    assert first == [237, 544, 369, 603, 625, 65, 13, 837]


def test_without_a_seed_runs_differ_and_can_be_repeated():
    flat = np.zeros(1000, np.float32)
    settings = Sampling(temperature=1.0)
    samplers = [Sampler(settings, [], 1000) for _ in range(2)]
    runs = [[sampler.next(flat).id for _ in range(8)] for sampler in samplers]
    assert runs[0] != runs[1]
    assert chosen({"temperature": 1.0, "seed": samplers[0].seed}, flat, 8) == runs[0]


def test_a_row_of_a_batch_is_a_run_of_its_own_seed():
    flat = np.zeros(1000, np.float32)
    in_batch = chosen({"temperature": 1.0, "seed": 3}, flat, 8, row=2)
    assert in_batch == chosen({"temperature": 1.0, "seed": 5}, flat, 8)


def test_the_prompt_counts_for_repetition_only():
    assert chosen({"repetition_penalty": 4.0}, prompt=[1, 1]) == [4]
    assert chosen({"presence_penalty": 1.0, "frequency_penalty": 1.0}, prompt=[1, 1]) == [1]


def test_penalties_remember_what_was_chosen():
    # 2 and 2 lead, then 1.5; each choice costs one.
    assert chosen({"frequency_penalty": 1.0}, count=6) == [1, 4, 3, 1, 4, 0]
    assert chosen({"presence_penalty": 1.0}, count=6) == [1, 4, 3, 1, 1, 1]
    assert chosen({"repetition_penalty": 4.0}, count=4) == [1, 4, 3, 0]


def test_bias_can_force_and_forbid():
    assert chosen({"logit_bias": {2: 100}}) == [2]
    assert chosen({"logit_bias": {1: -100, 4: -100.0}}) == [3]


def test_the_logits_are_left_alone():
    logits_v = LOGITS.copy()
    logits_v.flags.writeable = False
    every = {
        "logit_bias": {0: 1.0},
        "repetition_penalty": 2.0,
        "presence_penalty": 1.0,
        "constraint": lambda ids, scores_v: np.ones(6, bool),
    }
    chosen({**every, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "top_logprobs": 2}, logits_v, 3)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}, {"top_k": 9, "top_p": 0.5}])
def test_a_vocabulary_of_one(settings):
    every = {"min_p": 1.0, "typical_p": 0.1, "top_logprobs": 5, **settings}
    sampler = Sampler(Sampling(**every), [0], 1)
    assert sampler.next(np.float32([-7])) == Sampled(0, 0.0, ((0, 0.0),))


def test_extreme_temperatures_reach_no_infinity():
    logits_v = np.float32([3e4, 2.9e4, -3e4])
    cold = Sampler(Sampling(temperature=1e-6), [], 3).probabilities(logits_v)
    hot = Sampler(Sampling(temperature=1e6), [], 3).probabilities(logits_v)
    assert cold.tolist() == [1, 0, 0]
    np.testing.assert_allclose(hot, [0.34, 0.34, 0.32], atol=0.01)


@given(st.lists(st.integers(-40, 40), min_size=1, max_size=40), st.integers(0, 50))
def test_log_probabilities_are_the_models_own(eighths, k):
    logits_v = np.float32(eighths) / 8
    settings = Sampling(
        temperature=0.3, top_k=2, logit_bias={0: 5.0}, repetition_penalty=2.0, top_logprobs=k
    )
    sampled = Sampler(settings, [0], len(logits_v)).next(logits_v)
    exact = np.float64(logits_v) - np.log(np.exp(np.float64(logits_v)).sum())
    # float32 numbers of at most 10
    assert sampled.logprob == pytest.approx(exact[sampled.id], abs=1e-5)
    best_first = sorted(range(len(exact)), key=lambda id: (-logits_v[id], id))[:k]
    assert [id for id, _ in sampled.top] == best_first
    assert [x for _, x in sampled.top] == pytest.approx(exact[best_first].tolist(), abs=1e-5)


def test_log_probabilities_only_if_asked_for():
    sampler = Sampler(Sampling(), [], 6)
    assert sampler.next(LOGITS) == Sampled(1, None, ())
    sampler = Sampler(Sampling(top_logprobs=0), [], 6)
    assert sampler.next(LOGITS).logprob is not None
    assert sampler.next(LOGITS).top == ()


def test_a_constraint_sees_the_tokens_so_far_and_the_scores():
    calls = []

    def alternate(ids, scores_v):
        calls.append((list(ids), scores_v.copy()))
        assert not scores_v.flags.writeable
        return np.arange(6) % 2 == len(ids) % 2

    ids = chosen({"constraint": alternate, "logit_bias": {0: 1.0}}, count=3, prompt=[5])
    assert ids == [4, 1, 4]
    assert [ids for ids, _ in calls] == [[], [4], [4, 1]]
    np.testing.assert_array_equal(calls[0][1], LOGITS + np.float32([1, 0, 0, 0, 0, 0]))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (np.zeros(6, bool), "allows no token after 0 new ones"),
        ([False, False, True, False, False, False], "allows no token"),  # the impossible one
        ([1, 2], r"returned int64 \(2,\), expected a boolean mask .* bool \(6,\)"),
        (np.ones(5, bool), r"returned bool \(5,\)"),
        (np.ones((1, 6), bool), r"returned bool \(1, 6\)"),
        (None, "returned object"),
    ],
)
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}])
def test_a_constraint_that_leaves_nothing_or_returns_nonsense(returned, message, settings):
    logits_v = LOGITS.copy()
    logits_v[2] = -np.inf
    with pytest.raises(InputError, match=f"^constraint {message}"):
        chosen({"constraint": lambda ids, scores_v: returned, **settings}, logits_v)


@pytest.mark.parametrize(
    ("logits_v", "message"),
    [
        (np.float32([0, np.nan, 1]), "hold nan"),
        (np.float32([0, np.inf, 1]), "hold inf"),
        (np.full(3, -np.inf, np.float32), "no token has a chance"),
        (np.zeros(3), r"float64 \(3,\), expected an array of float32 \(3,\)"),
        (np.zeros(4, np.float32), r"float32 \(4,\)"),
        (np.zeros((1, 3), np.float32), r"float32 \(1, 3\)"),
        ([1.0, 2.0, 3.0], "expected an array"),
    ],
)
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}])
def test_broken_logits_are_refused(logits_v, message, settings):
    sampler = Sampler(Sampling(**settings), [], 3)
    with pytest.raises(InputError, match=f"^logits .*{message}"):
        sampler.next(logits_v)
    with pytest.raises(InputError, match=f"^logits .*{message}"):
        sampler.probabilities(logits_v)


@pytest.mark.parametrize(
    ("settings", "prompt", "name"),
    [
        ({}, [6], "prompt"),
        ({}, [-1], "prompt"),
        ({"logit_bias": {6: 1.0}}, [], "logit_bias"),
        ({"stop_ids": [6]}, [], "stop_ids"),
    ],
)
def test_tokens_that_the_model_does_not_have_are_refused(settings, prompt, name):
    with pytest.raises(InputError, match=f"^{name} has token -?\\d, expected 0 to 5"):
        Sampler(Sampling(**settings), prompt, 6)


def test_greedy_takes_no_time():
    """Well under a tenth of a millisecond: nothing is sorted, exponentiated or copied."""
    logits_v = np.random.default_rng(0).normal(size=50_280).astype(np.float32)
    sampler = Sampler(Sampling(), [], 50_280)
    times = []
    for _ in range(50):
        start = time.perf_counter()
        sampler.next(logits_v)
        times.append(time.perf_counter() - start)
    assert min(times) < 1e-4
