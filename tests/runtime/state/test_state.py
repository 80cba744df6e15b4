"""A state is a value: copied, saved, loaded, refused where it does not belong, never half."""

import gc
import json
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import anymamba
from anymamba import Engine, State
from anymamba.checkpoint import TensorBytes, read_header, write_safetensors
from anymamba.errors import CheckpointError, InputError, StateError
from tests.support.files import rewritten, write_small
from tests.support.reference import words
from tests.support.tolerance import assert_same


@pytest.fixture
def state(engine: Engine) -> State:
    return engine.prefill(engine.state(), words(9))


def assert_equal(one: State, other: State) -> None:
    assert one.token_count == other.token_count
    assert (one.conv_states == other.conv_states).all()
    assert (one.ssm_states == other.ssm_states).all()
    assert (one.logits is None) == (other.logits is None)
    if one.logits is not None:
        assert (one.logits == other.logits).all()


def test_what_a_state_shows(engine: Engine, state: State) -> None:
    assert state.conv_states.shape == (2, 1, 48, 4)
    assert state.ssm_states.shape == (2, 1, 48, 5)
    assert state.logits.shape == (61,)
    assert state.nbytes == 4 * (2 * 48 * (4 + 5) + 61)
    assert repr(state) == "State(9 tokens, 4 kB)"
    assert engine.state().logits is None
    assert not engine.state().ssm_states.any()


@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_a_file_gives_the_state_back(engine: Engine, tmp_path: Path, tokens: int) -> None:
    state = engine.prefill(engine.state(), words(tokens))
    state.save(tmp_path / "a.state")
    loaded = engine.load_state(str(tmp_path / "a.state"))
    assert_equal(loaded, state)
    first = engine.generate([1], 10, state=state)
    assert engine.generate([1], 10, state=loaded) == first
    assert [file.name for file in tmp_path.iterdir()] == ["a.state"]


def test_bfloat16_halves_the_file_and_rounds(engine: Engine, state: State, tmp_path: Path) -> None:
    state.save(tmp_path / "wide")
    state.save(tmp_path / "narrow", dtype="bfloat16")
    sizes = [(tmp_path / name).stat().st_size for name in ("wide", "narrow")]
    headers = [read_header(tmp_path / name).tensors for name in ("wide", "narrow")]
    assert sizes[0] - sizes[1] == state.nbytes // 2
    assert {record.dtype for record in headers[1].values()} == {"BF16"}
    loaded = engine.load_state(tmp_path / "narrow")
    assert loaded.ssm_states.dtype == np.float32
    # bfloat16 keeps 8 bits: half a unit of the last place is 2^-9 of the number.
    for rounded, exact in (
        (loaded.ssm_states, state.ssm_states),
        (loaded.conv_states, state.conv_states),
        (loaded.logits, state.logits),
    ):
        assert (np.abs(rounded - exact) <= np.abs(exact) * 2.0**-8).all()
    with pytest.raises(InputError, match="'float32' or 'bfloat16', got 'int8'"):
        state.save(tmp_path / "x", dtype="int8")


def test_more_tokens_than_can_be_counted_on_are_refused(
    engine: Engine, state: State, tmp_path: Path
) -> None:
    for count, fits in ((1 << 53, True), ((1 << 53) + 1, False)):
        state.assign(state.conv_states, state.ssm_states, count)
        state.save(tmp_path / "a.state")
        if fits:
            assert engine.load_state(tmp_path / "a.state").token_count == count
        else:
            with pytest.raises(StateError, match="not integers from 0 to 2\\^53"):
                engine.load_state(tmp_path / "a.state")


def test_what_stands_in_the_file(engine: Engine, state: State, tmp_path: Path) -> None:
    """As documented, read by another library."""
    state.save(tmp_path / "a.state")
    blocks = load_file(tmp_path / "a.state")
    assert blocks.keys() == {"conv_states", "ssm_states", "logits"}
    assert (blocks["ssm_states"] == state.ssm_states).all()
    metadata = read_header(tmp_path / "a.state").metadata
    assert metadata["format"] == "anymamba.state"
    assert metadata["format_version"] == "1"
    assert json.loads(metadata["token_counts"]) == [9]
    assert json.loads(metadata["model"]) == {
        "model_type": "mamba",
        "num_hidden_layers": 2,
        "hidden_size": 24,
        "intermediate_size": 48,
        "state_size": 5,
        "conv_kernel": 4,
    }
    assert len(metadata["weights_digest"]) == 64


def test_one_state_for_all_kinds_of_weights(folder: Path, state: State, tmp_path: Path) -> None:
    state.save(tmp_path / "a.state")
    for kind in ("f32", "bf16", "int8"):
        other = anymamba.load(folder, weights=kind)
        assert_equal(other.load_state(tmp_path / "a.state"), state)
        assert other.prefill(state.copy(), [1]).token_count == 10


def test_the_digest_is_computed_when_it_is_needed_and_once(folder: Path, tmp_path: Path) -> None:
    engine = anymamba.load(folder)
    asked = 0
    compute = engine.identity._compute_digest

    def counted() -> str:
        nonlocal asked
        asked += 1
        return compute()

    engine.identity._compute_digest = counted
    state = engine.prefill(engine.state(), words(3))
    assert asked == 0
    state.save(tmp_path / "a.state")
    engine.load_state(tmp_path / "a.state").copy().save(tmp_path / "b.state")
    assert asked == 1


def test_another_model_s_state_is_refused(state: State, tmp_path: Path) -> None:
    state.save(tmp_path / "a.state")
    wider = anymamba.load(write_small(tmp_path / "wider", hidden_size=32))
    with pytest.raises(StateError, match="hidden_size=24, this model has hidden_size=32"):
        wider.load_state(tmp_path / "a.state")
    other = anymamba.load(write_small(tmp_path / "other", seed=1))
    own, its = state.identity.digest[:16], other.state().identity.digest[:16]
    with pytest.raises(StateError, match=f"digest '{own}', this model's is '{its}'"):
        other.load_state(tmp_path / "a.state")
    longer = anymamba.load(write_small(tmp_path / "longer", vocab_size=70))
    with pytest.raises(StateError, match="vocabulary of 61, this model has 70"):
        longer.load_state(tmp_path / "a.state")


def test_a_file_without_digest_is_checked_by_its_sizes(
    engine: Engine, state: State, tmp_path: Path
) -> None:
    state.save(tmp_path / "a.state")
    loaded = engine.load_state(rewritten(tmp_path / "a.state", logits=None, weights_digest=None))
    assert (loaded.ssm_states == state.ssm_states).all()
    with pytest.raises(InputError, match="does not say which token comes next"):
        engine.generate([], state=loaded)
    assert engine.generate([1], 5, state=loaded).ids == engine.generate([1], 5, state=state).ids


def test_a_place_in_a_folder_that_does_not_exist(state: State, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="give a place in an existing folder"):
        state.save(tmp_path / "nowhere" / "a.state")


def test_a_failed_save_leaves_the_old_file(
    engine: Engine, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state.save(tmp_path / "a.state")

    def fails(path: Path, *rest: object) -> None:
        path.write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr("anymamba.runtime.state.state.write_safetensors", fails)
    with pytest.raises(OSError, match="the disk is full"):
        engine.prefill(state, [1]).save(tmp_path / "a.state")
    assert [file.name for file in tmp_path.iterdir()] == ["a.state"]
    assert engine.load_state(tmp_path / "a.state").token_count == 9


def test_assign_checks_shapes(engine: Engine, state: State) -> None:
    other = engine.state()
    other.assign(state.conv_states, state.ssm_states, 9)
    assert (other.ssm_states == state.ssm_states).all()
    assert other.logits is None
    with pytest.raises(InputError, match=r"ssm_states has shape \(2, 1, 48, 4\), expected"):
        other.assign(state.conv_states, state.conv_states, 9)


class Interrupted(Exception):
    """What Ctrl-C is to a program."""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs timers that interrupt")
@pytest.mark.parametrize("way", ["feed", "generate", "logits"])
def test_an_interruption_leaves_a_state_that_is_what_it_says(engine: Engine, way: str) -> None:
    """At whatever moment it comes: what the state has read is what its count says."""
    ids = words(1500)
    # By chance, for the likeliest tokens soon are the same one again and again.
    expected = engine.generate(ids[:5], 300, temperature=1.0, seed=0).ids
    text = ids if way != "generate" else ids[:5] + expected
    calls = {
        "feed": lambda state: engine.prefill(state, ids),
        "logits": lambda state: engine.logits(ids, state),
        "generate": lambda state: engine.generate(
            ids[:5], 300, temperature=1.0, seed=0, state=state
        ),
    }

    def interrupt(*_: object) -> None:
        raise Interrupted

    start = time.perf_counter()
    calls[way](engine.state())
    usual = time.perf_counter() - start
    before = signal.signal(signal.SIGALRM, interrupt)
    counts = set()
    # Python drops what a signal raises while the garbage collector's callbacks run.
    gc.disable()
    try:
        for trial in range(60):
            state = engine.state()
            try:
                signal.setitimer(signal.ITIMER_REAL, usual * (trial + 1) / 60)
                calls[way](state)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupted:  # by a timer that rings once
                pass
            counts.add(state.token_count)
            whole = engine.prefill(engine.state(), text[: state.token_count])
            assert_same(state.ssm_states, whole.ssm_states)
            assert_same(state.conv_states, whole.conv_states)
            if state.logits is not None:
                assert_same(state.logits, whole.logits)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        gc.enable()
        signal.signal(signal.SIGALRM, before)
    assert len(counts) > 1


def test_states_of_16_bits_written_by_others(engine: Engine, state: State, tmp_path: Path) -> None:
    """As MambaCache.save writes them from a cache whose windows are float16."""
    state.save(tmp_path / "a.state")
    header = read_header(tmp_path / "a.state")
    windows = state.conv_states.astype(np.float16)
    tensors = {
        "conv_states": TensorBytes("F16", windows.shape, windows.tobytes()),
        "ssm_states": TensorBytes("F32", state.ssm_states.shape, state.ssm_states.tobytes()),
    }
    write_safetensors(tmp_path / "b.state", tensors, header.metadata)
    assert (engine.load_state(tmp_path / "b.state").conv_states == windows).all()


@pytest.mark.parametrize("name", ["conv_states", "ssm_states", "logits"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_of_no_numbers_is_called_broken(
    name: str, value: float, engine: Engine, state: State, tmp_path: Path
) -> None:
    file = tmp_path / "a.state"
    state.save(file)
    block = load_file(file)[name]
    block.flat[3] = value
    rewritten(file, **{name: block})
    with pytest.raises(StateError, match=f"a.state' is broken: {name} holds NaN or infinity"):
        engine.load_state(file)


@pytest.mark.parametrize("name", ["conv_states", "ssm_states", "logits"])
def test_a_state_of_no_numbers_is_not_written(name: str, state: State, tmp_path: Path) -> None:
    getattr(state, name).flat[3] = np.nan
    with pytest.raises(StateError, match=f"the state holds NaN or infinity in its {name}"):
        state.save(tmp_path / "a.state")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("count", [-5, 1.5, None])
def test_no_such_number_of_tokens(count: Any, state: State) -> None:
    with pytest.raises(InputError, match="token_count"):
        state.assign(state.conv_states, state.ssm_states, count)
