"""The engine computes the model, however its tokens come, and remembers it in states."""

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import anymamba
from anymamba import Engine
from anymamba.errors import CheckpointError, InputError, StateError
from tests.support.files import small_weights, write_small
from tests.support.reference import reference_logits, words
from tests.support.tolerance import assert_same


@pytest.fixture(scope="module")
def bundled() -> Engine:
    return anymamba.load()


# Logits.


@pytest.mark.parametrize("length", [1, 2, 3, 30])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_word_embeddings": False},
        {"use_bias": True},
        {"use_conv_bias": False},
        {"layer_norm_epsilon": 0.1},
        {"conv_kernel": 2, "state_size": 16, "expand": 3},
    ],
)
def test_logits_are_the_paper_s(tmp_path: Path, fields: dict[str, Any], length: int) -> None:
    engine = anymamba.load(write_small(tmp_path, **fields))
    ids = words(length)
    eps = fields.get("layer_norm_epsilon", 1e-5)
    expected = reference_logits(small_weights(**fields), ids, eps)
    assert_same(engine.logits(ids), expected)


def test_no_tokens_no_logits(engine: Engine) -> None:
    state = engine.state()
    assert engine.logits([], state).shape == (0, 61)
    assert engine.prefill(state, []).token_count == 0
    assert state.logits is None


def test_a_long_text_is_read_in_stretches(engine: Engine) -> None:
    """More than two stretches of 512, against the paper's loop over all of it."""
    ids = words(1100)
    assert_same(engine.logits(ids), reference_logits(small_weights(), ids))


CUTS = st.lists(st.integers(0, 40), max_size=6)


@settings(max_examples=30)
@given(cuts=CUTS, ways=st.lists(st.sampled_from(["prefill", "logits", "score"]), min_size=7))
def test_a_text_may_be_cut_anywhere(engine: Engine, cuts: list[int], ways: list[str]) -> None:
    ids = words(40)
    borders = [0, *sorted(cuts), 40]
    whole = engine.prefill(engine.state(), ids)
    state = engine.state()
    for start, stop, way in zip(borders, borders[1:], ways, strict=False):
        getattr(engine, way)(
            *((state, ids[start:stop]) if way == "prefill" else (ids[start:stop], state))
        )
    assert state.token_count == 40
    assert_same(state.logits, whole.logits)
    assert_same(state.ssm_states, whole.ssm_states)
    assert_same(state.conv_states, whole.conv_states)


def test_progress_is_told(engine: Engine) -> None:
    told: list[tuple[int, int]] = []
    engine.prefill(engine.state(), words(1100), lambda *progress: told.append(progress))
    assert told == [(512, 1100), (1024, 1100), (1100, 1100)]


# Writing.


def greedy(engine: Engine, ids: list[int], count: int) -> list[int]:
    """The likeliest token each time, by logits of the whole text each time."""
    text = list(ids)
    for _ in range(count):
        text.append(int(engine.logits(text)[-1].argmax()))
    return text[len(ids) :]


def test_generate_takes_the_likeliest_token_each_time(engine: Engine) -> None:
    ids = words(7)
    generation = engine.generate(ids, max_new_tokens=12)
    assert generation.ids == greedy(engine, ids, 12)
    assert generation.prompt_ids == ids
    assert (generation.finish_reason, generation.text) == ("length", "")
    assert (generation.logprobs, generation.top_logprobs) == (None, None)


@pytest.mark.slow
def test_stream_gives_what_generate_gives(bundled: Engine) -> None:
    settings = {"max_new_tokens": 60, "temperature": 0.9, "seed": 3, "top_logprobs": 2}
    pieces = list(bundled.stream("ROMEO:", **settings))
    whole = bundled.generate("ROMEO:", **settings)
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [piece.ids for piece in pieces] == [(id,) for id in whole.ids]
    assert [piece.logprob for piece in pieces] == whole.logprobs
    assert [piece.top_logprobs for piece in pieces] == whole.top_logprobs
    assert [piece.finish_reason for piece in pieces] == [None] * 59 + ["length"]
    assert whole.text == bundled.detokenize(whole.ids)


def test_logprobs_are_those_of_score(engine: Engine) -> None:
    generation = engine.generate(words(6), max_new_tokens=20, top_logprobs=0)
    ids = generation.prompt_ids + generation.ids
    # Two ways through the model, one in stretches and one in steps: the contract's tolerance.
    assert np.allclose(generation.logprobs, engine.score(ids).logprobs[-20:], atol=1e-4)


@pytest.mark.parametrize("state", [False, True])
def test_a_stop_string_ends_the_text(bundled: Engine, state: bool) -> None:
    given = {"state": bundled.state()} if state else {}
    whole = bundled.generate("ROMEO:", max_new_tokens=40).text
    generation = bundled.generate("ROMEO:", max_new_tokens=40, stop=whole[10:13], **given)
    assert generation.text == whole[: whole.index(whole[10:13])]
    assert generation.finish_reason == "stop"
    assert bundled.detokenize(generation.ids) == generation.text + whole[10:13]
    if state:
        assert given["state"].token_count == 6 + len(generation.ids)


def test_a_stop_string_at_the_last_token_counts_as_one(bundled: Engine) -> None:
    whole = bundled.generate("ROMEO:", max_new_tokens=13).text
    generation = bundled.generate("ROMEO:", max_new_tokens=13, stop=whole[-2:])
    assert (generation.finish_reason, generation.text) == ("stop", whole[: whole.index(whole[-2:])])


def test_an_end_token_ends_the_text(tmp_path: Path, engine: Engine) -> None:
    ids = words(7)
    free = engine.generate(ids, max_new_tokens=12).ids
    ends = anymamba.load(write_small(tmp_path, eos_token_id=free[4]))
    assert ends.end_ids == (free[4],)
    first = free.index(free[4])
    for generation in (
        ends.generate(ids, max_new_tokens=12),
        engine.generate(ids, max_new_tokens=12, stop_ids=[free[4]]),
    ):
        assert generation.ids == free[: first + 1]
        assert generation.finish_reason == "eos"


def test_generation_config_goes_before_the_config(tmp_path: Path) -> None:
    write_small(tmp_path, eos_token_id=3)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert anymamba.load(tmp_path).end_ids == (5, 7)


def test_an_end_token_has_no_text(bundled: Engine) -> None:
    whole = bundled.generate("ROMEO:", max_new_tokens=10)
    generation = bundled.generate("ROMEO:", max_new_tokens=10, stop_ids=[whole.ids[2]])
    assert generation.text == whole.text[:2]
    assert generation.ids == whole.ids[:3]


def test_settings_by_name_go_before_those_of_sampling(bundled: Engine) -> None:
    from anymamba.runtime.generation.sampling import Sampling

    sampling = Sampling(temperature=2.0, seed=1, max_new_tokens=5)
    changed = bundled.generate("ROMEO:", sampling=sampling, temperature=0)
    assert changed.ids == bundled.generate("ROMEO:", max_new_tokens=5).ids
    assert len(bundled.generate("ROMEO:", 3, sampling).ids) == 3
    with pytest.raises(InputError, match="no setting temprature; there are temperature, top_k"):
        bundled.generate("ROMEO:", temprature=0)


# Batches.


@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    seed=st.integers(0, 5),
    temperature=st.sampled_from([0, 1.0]),
)
def test_each_row_equals_its_own_run(
    engine: Engine, lengths: list[int], seed: int, temperature: float
) -> None:
    """Whatever stands beside it, also after others have ended: token 9 ends a text."""
    prompts = [words(length, seed=row) for row, length in enumerate(lengths)]
    chosen = {"max_new_tokens": 15, "temperature": temperature, "stop_ids": [9, 12, 30]}
    batch = engine.generate_batch(prompts, seed=seed, **chosen)
    for row, (prompt, generation) in enumerate(zip(prompts, batch, strict=True)):
        assert generation == engine.generate(prompt, seed=seed + row, **chosen)


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_rows_of_bfloat16_equal_their_own_runs(bundled: Engine, temperature: float) -> None:
    prompts = ["ROMEO:", "JULIET:\nWhat", "K", "The king of all the world is " * 3]
    chosen = {"max_new_tokens": 60, "temperature": temperature, "stop": ["king"]}
    batch = bundled.generate_batch(prompts, seed=5, **chosen)
    for row, (prompt, generation) in enumerate(zip(prompts, batch, strict=True)):
        assert generation == bundled.generate(prompt, seed=5 + row, **chosen)


def test_a_batch_with_long_and_many_rows(engine: Engine) -> None:
    """Prompts of several stretches beside short ones, and more rows than one step takes."""
    prompts = [words(1300, seed=0), *(words(1 + row % 3, seed=row) for row in range(70))]
    batch = engine.generate_batch(prompts, max_new_tokens=4)
    for row in (0, 1, 35, 70):
        assert batch[row] == engine.generate(prompts[row], max_new_tokens=4)


def test_a_batch_begins_with_a_state_and_leaves_it(engine: Engine) -> None:
    state = engine.prefill(engine.state(), words(9))
    before = state.copy()
    batch = engine.generate_batch([[4], [], [5, 6]], max_new_tokens=5, state=state)
    for tail, generation in zip(([4], [], [5, 6]), batch, strict=True):
        assert generation.ids == engine.generate(words(9) + tail, max_new_tokens=5).ids
    assert (state.ssm_states == before.ssm_states).all()
    assert state.token_count == 9


def test_no_prompts_and_one_text(engine: Engine) -> None:
    assert engine.generate_batch([]) == []
    with pytest.raises(InputError, match="expected several"):
        engine.generate_batch("ROMEO:")


# States.


def test_continuing_from_a_state_is_continuing_the_text(engine: Engine) -> None:
    ids = words(9)
    whole = engine.generate(ids, max_new_tokens=20)
    state = engine.state()
    first = engine.generate(ids, max_new_tokens=8, state=state)
    assert state.token_count == 17
    second = engine.generate([], max_new_tokens=12, state=state)
    assert first.ids + second.ids == whole.ids
    assert state.token_count == 29


def test_who_stops_listening_leaves_a_state_that_has_read_what_was_given_out(
    engine: Engine,
) -> None:
    ids = words(9)
    for heard in range(4):
        state, given = engine.state(), []
        stream = engine.stream(ids, max_new_tokens=20, state=state)
        for _ in range(heard):
            given += next(stream).ids
        stream.close()
        read = ids + given if heard else []
        assert state.token_count == len(read)
        if read:
            assert_same(state.logits, engine.logits(read)[-1])


def test_a_fork_goes_its_own_way(engine: Engine) -> None:
    state = engine.prefill(engine.state(), words(9))
    fork = state.copy()
    engine.prefill(fork, words(5, seed=2))
    assert (state.token_count, fork.token_count) == (9, 14)
    assert_same(state.logits, engine.logits(words(9))[-1])
    assert_same(fork.logits, engine.logits(words(9) + words(5, seed=2))[-1])


def test_special_tokens_come_once(bundled: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    encode = bundled._codec.encode
    monkeypatch.setattr(
        bundled._codec, "encode", lambda text, special: asked.append(special) or encode(text, True)
    )
    state = bundled.prefill(bundled.state(), "ROMEO:")
    bundled.prefill(state, " But")
    bundled.generate("soft", max_new_tokens=1, state=state)
    assert asked == [True, False, False]


def test_a_state_of_another_model_is_refused(engine: Engine, tmp_path: Path) -> None:
    other = anymamba.load(write_small(tmp_path / "other", seed=1))
    wider = anymamba.load(write_small(tmp_path / "wider", hidden_size=32))
    for call in (
        lambda owner: engine.prefill(owner.state(), [1]),
        lambda owner: engine.logits([1], owner.state()),
        lambda owner: engine.score([1], owner.state()),
        lambda owner: engine.generate([1], state=owner.state()),
        lambda owner: engine.stream([1], state=owner.state()),
        lambda owner: engine.generate_batch([[1]], state=owner.state()),
    ):
        with pytest.raises(StateError, match="other weights"):
            call(other)
        with pytest.raises(StateError, match="hidden_size=32, this model has hidden_size=24"):
            call(wider)


def test_another_engine_of_the_same_model_takes_the_state(tmp_path: Path) -> None:
    write_small(tmp_path)
    first, second = anymamba.load(tmp_path), anymamba.load(tmp_path, threads=1)
    state = first.prefill(first.state(), words(9))
    second.prefill(state, words(5, seed=2))
    assert_same(state.logits, first.logits(words(9) + words(5, seed=2))[-1])


# Scores.


@pytest.mark.parametrize("length", [0, 1, 2, 600])
def test_score_is_the_sum_over_the_tokens(engine: Engine, length: int) -> None:
    ids = words(length)
    score = engine.score(ids)
    logits = reference_logits(small_weights(), ids)[:-1] if length else np.empty((0, 61))
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = [row[id] for row, id in zip(logprobs, ids[1:], strict=True)]
    assert score.ids == ids
    assert np.allclose(score.logprobs, expected, atol=1e-4)  # the contract, for logits of about 1
    assert score.nats == pytest.approx(-sum(expected), abs=1e-4 * max(length, 1))
    if length > 1:
        assert score.perplexity == pytest.approx(math.exp(-np.mean(expected)), rel=1e-4)
    else:
        assert math.isnan(score.perplexity)


def test_a_state_predicts_the_first_token_too(engine: Engine) -> None:
    ids = words(20)
    state = engine.prefill(engine.state(), ids[:8])
    rest = engine.score(ids[8:], state)
    assert np.allclose(rest.logprobs, engine.score(ids).logprobs[-12:], atol=1e-4)
    assert state.token_count == 20


def test_logits_of_a_long_text_are_never_there_together(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anymamba.runtime import prefill as reading

    monkeypatch.setattr(reading, "_MOST_LOGITS", 61 * 10)
    most = 0
    read_all = engine._network.read_all

    def watched(*arguments: Any) -> Any:
        nonlocal most
        logits = read_all(*arguments)
        most = max(most, len(logits))
        return logits

    monkeypatch.setattr(engine._network, "read_all", watched)
    scored = engine.score(words(95))
    assert most == 10
    assert np.allclose(scored.logprobs, engine.score(words(95)).logprobs, atol=1e-4)


# Threads.


def test_threads_share_an_engine(engine: Engine) -> None:
    expected = [engine.generate(words(50, seed), max_new_tokens=30).ids for seed in range(4)]
    found: list[Any] = [None] * 4

    def run(seed: int) -> None:
        for _ in range(5):
            found[seed] = engine.generate(words(50, seed), max_new_tokens=30).ids
            assert found[seed] == expected[seed]

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_the_number_of_threads_changes_nothing(tmp_path: Path) -> None:
    write_small(tmp_path)
    one, two = anymamba.load(tmp_path, threads=1), anymamba.load(tmp_path, threads=2)
    assert (one.threads, two.threads) == (1, 2)
    assert (one.logits(words(300)) == two.logits(words(300))).all()


# What is refused.


@pytest.mark.parametrize("token", [-1, 61, 2**40])
def test_a_token_that_does_not_exist_leaves_the_state_as_it_was(engine: Engine, token: int) -> None:
    state = engine.prefill(engine.state(), words(9))
    before = state.copy()
    ids = [*words(600), token]
    calls: list[Callable[[], object]] = [
        lambda: engine.prefill(state, ids),
        lambda: engine.logits(ids, state),
        lambda: engine.score(ids, state),
        lambda: engine.generate(ids, state=state),
        lambda: engine.generate_batch([[1], ids], state=state),
    ]
    for call in calls:
        with pytest.raises(InputError, match=f"token {token}.*tokenizer"):
            call()
    assert state.token_count == 9
    assert (state.ssm_states == before.ssm_states).all()


@pytest.mark.parametrize("text", [[[1, 2]], [[1], [1, 2]], [0.5], [True], ["a"], 3, [2**70], None])
def test_what_is_no_text_is_refused(engine: Engine, text: Any) -> None:
    with pytest.raises(InputError, match="expected a text, or the whole numbers"):
        engine.prefill(engine.state(), text)


def test_an_empty_prompt(tmp_path: Path, engine: Engine) -> None:
    with pytest.raises(InputError, match="no token for the beginning"):
        engine.generate([])
    begins = anymamba.load(write_small(tmp_path, bos_token_id=3))
    assert begins.generate([], 5).ids == engine.generate([3], 5).ids
    assert begins.generate([], 5).prompt_ids == [3]


def test_without_a_tokenizer_there_are_tokens_only(engine: Engine) -> None:
    assert engine.generate([1], 5).text == ""
    for call in (
        lambda: engine.tokenize("a"),
        lambda: engine.detokenize([1]),
        lambda: engine.generate("a"),
        lambda: engine.generate([1], stop=["a"]),
    ):
        with pytest.raises(CheckpointError, match=r"without a tokenizer.*tokenizer="):
            call()


def test_what_is_no_state_is_refused(engine: Engine) -> None:
    wrong: Any = 5
    calls: list[Callable[[], object]] = [
        lambda: engine.prefill(wrong, [1]),
        lambda: engine.logits([1], wrong),
        lambda: engine.score([1], wrong),
        lambda: engine.generate([1], state=wrong),
        lambda: engine.stream([1], state=wrong),
        lambda: engine.generate_batch([[1]], state=wrong),
    ]
    for call in calls:
        with pytest.raises(InputError, match="expected a state"):
            call()


def test_prompts_may_come_from_a_generator(engine: Engine) -> None:
    prompts = [[1], [2, 3]]
    found = engine.generate_batch((prompt for prompt in prompts), max_new_tokens=3)
    assert found == engine.generate_batch(prompts, max_new_tokens=3)
    wrong: Any = 5
    with pytest.raises(InputError, match="prompts must be a list"):
        engine.generate_batch(wrong)


def test_settings_of_another_kind_are_refused(engine: Engine) -> None:
    wrong: Any = {"temperature": 1}
    with pytest.raises(InputError, match="sampling must be a Sampling"):
        engine.generate([1], 2, wrong)


def test_a_token_beyond_signed_numbers_is_named(engine: Engine) -> None:
    huge: Any = np.array([1, 2**63 + 5], np.uint64)
    with pytest.raises(InputError, match="token 9223372036854775813, expected"):
        engine.logits(huge)
