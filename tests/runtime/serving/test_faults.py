"""What goes wrong with one text, or with what is kept of it, ends nobody else's."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import anymamba
from anymamba import Engine
from anymamba.errors import CheckpointError, OverloadError, StateError
from anymamba.runtime.serving import PrefixCache, Scheduler, StateFolder
from anymamba.runtime.serving.prefix_cache import key_of
from anymamba.runtime.serving.scheduler import Submission
from anymamba.runtime.state import State
from tests.runtime.serving.test_scheduler import Client, alone
from tests.support.files import write_folder
from tests.support.reference import words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("faults") / "model")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return anymamba.load(folder)


def state_of(engine: Engine, count: int) -> State:
    return engine.prefill(engine.state(), words(count))


@pytest.mark.parametrize("only_read", [True, False])
def test_a_state_beyond_float32_ends_its_own_text_only(engine: Engine, only_read: bool) -> None:
    state, whole = engine.state(), state_of(engine, 3)
    state.assign(
        np.full_like(whole.conv_states, 3e38), np.full_like(whole.ssm_states, 3e38), token_count=3
    )
    with Scheduler({"m": engine}, cache=PrefixCache(1 << 24)) as scheduler:
        other = Client(scheduler, words(4), sampling={"max_new_tokens": 200})
        other.started()
        hurt = Client(scheduler, words(5), state=state, only_read=only_read)
        with pytest.raises(StateError, match="the state leads to numbers beyond float32"):
            hurt.ids()
        assert other.ids() == alone(engine, words(4), max_new_tokens=200)


def broken(*_: object, **__: object) -> Any:
    raise MemoryError("no more")


@pytest.mark.parametrize("where", ["find", "keep"])
def test_a_cache_that_fails_costs_a_reading(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(PrefixCache, where, broken)
    with Scheduler({"m": engine}, cache=PrefixCache(1 << 24)) as scheduler:
        for _ in range(2):
            client = Client(scheduler, words(9))
            assert client.started().cached_tokens == 0
            assert client.ids() == alone(engine, words(9))
        assert scheduler.running == 0


def test_what_fails_at_its_start_hears_so(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with Scheduler({"m": engine}, rows=1) as scheduler:
        add = scheduler._lanes["m"].batch.add
        monkeypatch.setattr(scheduler._lanes["m"].batch, "add", broken)
        with pytest.raises(OverloadError, match="out of memory: try again later"):
            Client(scheduler, words(9)).ids()
        monkeypatch.setattr(scheduler._lanes["m"].batch, "add", add)
        assert Client(scheduler, words(9)).ids() == alone(engine, words(9))


def test_a_constraint_with_a_fault_ends_its_text_only(engine: Engine) -> None:
    with Scheduler({"m": engine}) as scheduler:
        other = Client(scheduler, words(5))
        with pytest.raises(OverloadError, match=r"the request has failed: .*a wing"):
            Client(scheduler, words(5), sampling={"constraint": fault}).ids()
        assert other.ids() == alone(engine, words(5))


def fault(*_: object) -> Any:
    raise RuntimeError("a wing")


def test_a_thread_that_died_says_so(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    monkeypatch.setattr(Scheduler, "_admit", fault)
    scheduler = Scheduler({"m": engine})
    assert scheduler.failure is None
    with pytest.raises(OverloadError, match="the server has failed"):
        Client(scheduler, words(5)).ids()
    scheduler.close()
    assert scheduler.failure is not None
    with pytest.raises(OverloadError, match="the server has failed"):
        Client(scheduler, words(5))


@pytest.mark.parametrize("damage", ["count", "logits"])
def test_a_file_that_is_not_what_its_name_says(engine: Engine, tmp_path: Path, damage: str) -> None:
    files = StateFolder(tmp_path, 1 << 30)
    files.write(key_of(np.array(words(20))), state_of(engine, 20))
    files.close()
    (file,) = tmp_path.iterdir()
    other = state_of(engine, 20 + (damage == "count"))
    if damage == "logits":
        whole, other = other, engine.state()
        other.assign(whole.conv_states, whole.ssm_states, 20)
    other.save(file)
    cache = PrefixCache(1 << 24, StateFolder(tmp_path, 1 << 30))
    with Scheduler({"m": engine}, cache=cache) as scheduler:
        client = Client(scheduler, words(20))
        assert client.started().cached_tokens == 0
        assert client.ids() == alone(engine, words(20))


def test_forgotten_texts_cost_others_nothing(engine: Engine) -> None:
    """Only the names of a text's own beginnings are looked up."""
    cache, state = PrefixCache(0), state_of(engine, 1)
    for number in range(3000):
        cache.keep("m", (1, str(number)), state)
    long = np.array(words(5000))
    began = time.process_time()
    assert cache.find("m", long, engine.identity).miss == "no such prefix"
    assert time.process_time() - began < 1
    assert list(cache._counts(engine.identity)) == [1]


def test_names_are_forgotten_at_last(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anymamba.runtime.serving.prefix_cache._MOST_FORGOTTEN", 2)
    cache = PrefixCache(0)
    for count in (3, 4, 5):
        cache.keep("m", key_of(np.array(words(count))), state_of(engine, count))
    assert cache.find("m", np.array(words(3)), engine.identity).miss == "no such prefix"
    assert cache.find("m", np.array(words(4)), engine.identity).miss == "evicted"
    assert sorted(cache._counts(engine.identity)) == [4, 5]
    assert len(cache._models) == 2


def test_cancelled_requests_do_not_fill_the_queue(engine: Engine) -> None:
    with Scheduler({"m": engine}, rows=1, queue=3) as scheduler:
        many = {"max_new_tokens": 10**6}
        busy = Client(scheduler, words(5), sampling=many)
        busy.started()
        head = Client(scheduler, words(5), sampling=many)
        for _ in range(8):  # behind one that goes on waiting
            Client(scheduler, words(5)).submission.cancel()
        Client(scheduler, words(5))
        head.submission.cancel()
        busy.submission.cancel()


def test_a_long_prompt_takes_a_few_states(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its tokens is hashed once, however many states are kept of it."""
    hashed: list[int] = []
    key_after = Submission.key_after

    def noted(submission: Submission, count: int) -> Any:
        hashed.append(count)
        return key_after(submission, count)

    monkeypatch.setattr(Submission, "key_after", noted)
    cache = PrefixCache(1 << 24)
    with Scheduler({"m": engine}, cache=cache, snapshot_tokens=10) as scheduler:
        answer = Client(scheduler, words(700)).ids()
    assert hashed == [10, 20, 40, 80, 160, 320, 640, 700, 704]
    text = words(700) + answer
    for count in hashed:
        state = cache.find("m", np.array(text[:count]), engine.identity)
        assert (state.count, state.miss) == (count, None)


def test_a_prompt_has_a_most_length(engine: Engine) -> None:
    with (
        Scheduler({"m": engine}, prompt_tokens=8) as scheduler,
        pytest.raises(anymamba.errors.InputError, match="9 tokens, expected at most 8"),
    ):
        Client(scheduler, words(9))


def test_rows_hold_no_logits_of_others_steps(engine: Engine) -> None:
    """Neither one whose text has ended, nor one whose prompt waits while others are read."""
    with Scheduler({"m": engine}, rows=3, chunk_tokens=8) as scheduler:
        assert Client(scheduler, [1, 2]).ids()
        lane = scheduler._lanes["m"]
        assert lane.batch.blocks.logits == [None] * 3
    batch = engine.batch(3, 8)
    prompts = [np.arange(20) % 16 for _ in range(3)]
    for row, ids in enumerate(prompts):
        batch.add(row, ids, None)
    for _ in range(4):
        batch.step()
    held = [logits_v for logits_v in batch.blocks.logits if logits_v is not None]
    assert held
    assert all(logits_v.base is None for logits_v in held)


def test_a_folder_counts_its_files_as_they_come_and_go(engine: Engine, tmp_path: Path) -> None:
    folder = StateFolder(tmp_path, 1 << 30)
    states = {count: engine.prefill(engine.state(), [1] * count) for count in (1, 2, 3)}
    for count, state in states.items():
        for text in "ab":
            folder.write((count, text * 64), state)
    folder.close()
    assert folder.counts(engine.identity) == {1, 2, 3}
    again = StateFolder(tmp_path, 1 << 30)
    assert again.counts(engine.identity) == {1, 2, 3}
    size = next(tmp_path.iterdir()).stat().st_size
    small = StateFolder(tmp_path, 4 * size)
    small.write((4, "c" * 64), engine.prefill(engine.state(), [1] * 4))
    small.close()
    left = {int(path.name.partition("-")[0]) for path in tmp_path.iterdir()}
    assert small.counts(engine.identity) == left
    assert small._nbytes == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_a_burst_of_small_states_is_kept_whole(engine: Engine, tmp_path: Path) -> None:
    errors: list[Exception] = []
    folder, state = StateFolder(tmp_path, 1 << 30, errors.append), state_of(engine, 3)
    for number in range(100):
        folder.write((3, f"{number:064x}"), state)
    folder.close()
    assert (errors, len(list(tmp_path.iterdir()))) == ([], 100)
    assert folder._waiting_bytes == 0


def test_a_kept_state_holds_no_others_logits(engine: Engine) -> None:
    with Scheduler({"m": engine}, cache=(cache := PrefixCache(1 << 24))) as scheduler:
        for client in [Client(scheduler, words(5 + i)) for i in range(4)]:
            client.ids()
    for state in cache._states.values():
        assert state.logits is not None
        assert state.logits.base is None


def test_a_writer_goes_on_after_any_fault(
    engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files, save = StateFolder(tmp_path, 1 << 30), State.save
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(State, "save", broken)
        for count in (3, 4):
            files.write(key_of(np.array(words(count))), state_of(engine, count))
        while not files._waiting.empty():
            time.sleep(0.001)
        time.sleep(0.01)
        patch.setattr(State, "save", save)
        files.write(key_of(np.array(words(5))), state_of(engine, 5))
        files.close()
        files.close()  # it has ended, and does not hang
    assert [file.name.split("-")[0] for file in tmp_path.iterdir()] == ["5"]
    assert [record.getMessage() for record in caplog.records] == [
        "a state was not kept as a file: no more"
    ]


@pytest.mark.parametrize("settings", [{"weights": "int8"}, {"deterministic": True}])
def test_files_of_another_arithmetic_are_not_read(
    engine: Engine, folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    files = StateFolder(tmp_path, 1 << 30)
    files.write(key := key_of(np.array(words(5))), state_of(engine, 5))
    files.close()
    files = StateFolder(tmp_path, 1 << 30)
    assert files.counts(engine.identity) == {5}
    other = anymamba.load(folder, **settings)
    assert other.identity.digest == engine.identity.digest
    assert files.counts(other.identity) == set()
    assert files.read(key, other.identity) is None
    files.write(key, state_of(other, 5))
    files.close()
    files = StateFolder(tmp_path, 1 << 30)  # after a restart, each finds its own
    for found in (engine, other):
        assert files.counts(found.identity) == {5}
        assert files.read(key, found.identity) is not None


def test_a_file_that_goes_meanwhile_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone:
        name = f"5-{'0' * 64}-{'0' * 16}-f32-float32.safetensors"

        def stat(self) -> Any:
            raise FileNotFoundError(2, "no such file")

    monkeypatch.setattr("os.scandir", lambda _: [Gone()])
    assert StateFolder(tmp_path, 1)._sizes == {}
    monkeypatch.setattr(Gone, "stat", lambda self: fail())
    with pytest.raises(CheckpointError, match="cannot be used"):
        StateFolder(tmp_path, 1)


def fail() -> Any:
    raise PermissionError(13, "permission denied")
