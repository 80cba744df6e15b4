"""What a scheduler promises its clients: each text as it would be alone, and nothing lost."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import anymamba
from anymamba import Engine, Sampling
from anymamba.errors import AnyMambaError, InputError, OverloadError, StateError
from anymamba.runtime.generation import TokenOutput
from anymamba.runtime.serving import PrefixCache, Request, Scheduler, Started, Submission
from anymamba.runtime.state import State
from tests.support.files import write_folder
from tests.support.reference import words
from tests.support.tolerance import assert_same

CHUNK = 32


@pytest.fixture(params=["mamba", "mamba2"], scope="module")
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    place = tmp_path_factory.mktemp("serving") / "model"
    return anymamba.load(write_folder(place, model_type=request.param))


@pytest.fixture
def cache() -> PrefixCache:
    return PrefixCache(1 << 24)


@pytest.fixture
def scheduler(engine: Engine, cache: PrefixCache) -> Iterator[Scheduler]:
    options = {"rows": 4, "chunk_tokens": CHUNK, "snapshot_tokens": 4 * CHUNK}
    with Scheduler({"m": engine, "m:a": engine}, cache=cache, **options) as started:
        yield started


class Client:
    """Sends a request and hears what comes of it."""

    def __init__(self, scheduler: Scheduler, ids: list[int], **options: Any) -> None:
        self.events: queue.Queue[Any] = queue.Queue()
        settings = {"max_new_tokens": 5} | options.pop("sampling", {})
        sampling = None if options.pop("only_read", False) else Sampling(**settings)
        options.setdefault("model", "m")
        request = Request(np.array(ids, np.int64), sampling, **options)
        self.submission: Submission = scheduler.submit(request, self.events.put)

    def started(self) -> Started:
        event = self.events.get(timeout=20)
        assert isinstance(event, Started), event
        return event

    def ids(self) -> list[int]:
        found: list[int] = []
        while True:
            event = self.events.get(timeout=20)
            if isinstance(event, AnyMambaError):
                raise event
            if isinstance(event, TokenOutput):
                found += event.ids
                if event.finish_reason is not None:
                    return found

    def state(self) -> State:
        self.started()
        state = self.events.get(timeout=20)
        assert isinstance(state, State)
        return state


def alone(engine: Engine, ids: list[int], **sampling: Any) -> list[int]:
    return engine.generate(ids, **{"max_new_tokens": 5, **sampling}).ids


def test_many_at_once_are_each_as_alone(engine: Engine, scheduler: Scheduler) -> None:
    texts = [words(3 + 7 * i) for i in range(12)]
    options = [{"temperature": 0.9, "seed": i, "max_new_tokens": 1 + i % 7} for i in range(12)]
    clients = [
        Client(scheduler, ids, sampling=chosen, client=str(i % 3))
        for i, (ids, chosen) in enumerate(zip(texts, options, strict=True))
    ]
    for client, ids, chosen in zip(clients, texts, options, strict=True):
        assert client.ids() == alone(engine, ids, **chosen)


def test_a_second_turn_reads_only_what_is_new(engine: Engine, scheduler: Scheduler) -> None:
    first = Client(scheduler, words(100))
    assert first.started() == Started(0, "no such prefix")
    answer = first.ids()
    second = Client(scheduler, words(100) + answer + [7, 8, 9])
    assert second.started() == Started(104, "no such prefix")  # all but the token chosen last
    assert second.ids() == alone(engine, words(100) + answer + [7, 8, 9])


@pytest.mark.parametrize("tail", [0, 1, CHUNK])
def test_a_tail_of_any_length(engine: Engine, scheduler: Scheduler, tail: int) -> None:
    """Of none, of one token and of a whole chunk; a hit of all tokens works."""
    assert Client(scheduler, words(50)).ids() == alone(engine, words(50))
    again = Client(scheduler, words(50 + tail))
    assert again.started().cached_tokens == 50
    assert again.ids() == alone(engine, words(50 + tail))


def test_a_state_is_never_cut_backwards(engine: Engine, scheduler: Scheduler) -> None:
    """A text that ends within a longer one that was read finds nothing."""
    Client(scheduler, words(60)).ids()
    shorter = Client(scheduler, words(59))
    assert shorter.started() == Started(0, "no such prefix")
    assert shorter.ids() == alone(engine, words(59))


def test_states_are_kept_where_messages_end(engine: Engine, scheduler: Scheduler) -> None:
    Client(scheduler, words(90), keep_at=(13, 70)).ids()
    other = [*words(70), 1, 2, 3]
    fork = Client(scheduler, other)
    assert fork.started().cached_tokens == 70
    assert fork.ids() == alone(engine, other)
    assert Client(scheduler, [*words(13), 5]).started().cached_tokens == 13


def test_a_long_prompt_is_kept_every_so_often(engine: Engine, scheduler: Scheduler) -> None:
    Client(scheduler, words(10 * CHUNK)).ids()
    other = [*words(6 * CHUNK), 1]
    fork = Client(scheduler, other)
    assert fork.started().cached_tokens == 4 * CHUNK
    assert fork.ids() == alone(engine, other)


def test_a_kept_state_is_the_one_after_exactly_these_tokens(
    engine: Engine, scheduler: Scheduler, cache: PrefixCache
) -> None:
    Client(scheduler, words(90), keep_at=(13, 70)).ids()
    for count in (13, 70, 90):
        found = cache.find("m", np.array(words(count)), engine.identity)
        expected = engine.prefill(engine.state(), words(count))
        assert found.state is not None
        assert found.state.token_count == count
        assert_same(found.state.ssm_states, expected.ssm_states)
        assert_same(found.state.conv_states, expected.conv_states)


def test_a_miss_says_why(engine: Engine) -> None:
    engines = dict.fromkeys(("m", "m:a", "other"), engine)
    room = PrefixCache(int(1.5 * engine.prefill(engine.state(), [1]).nbytes))
    with Scheduler(engines, cache=room) as scheduler:
        read = {"only_read": True}
        Client(scheduler, words(20), **read).state()
        assert Client(scheduler, words(21), model="m:a").started().miss == "other adapter"
        assert Client(scheduler, words(21), model="other").started().miss == "other model"
        Client(scheduler, words(9), **read).state()
        assert Client(scheduler, words(20), **read).started().miss == "evicted"
        assert Client(scheduler, words(20)[::-1], **read).started().miss == "no such prefix"


def test_the_cache_stays_within_its_budget(engine: Engine) -> None:
    most = 5 * engine.prefill(engine.state(), [1]).nbytes
    cache = PrefixCache(most)
    with Scheduler({"m": engine}, cache=cache) as scheduler:
        for number in range(12):
            Client(scheduler, [number, *words(5)]).ids()
            assert cache.nbytes <= most
    assert cache.nbytes == sum(state.nbytes for state in cache._states.values())


def test_a_state_stays_as_it_is(engine: Engine, scheduler: Scheduler) -> None:
    """Ten answers to one document, which is read once."""
    state = Client(scheduler, words(40), only_read=True).state()
    assert state.token_count == 40
    for number in range(10):
        client = Client(scheduler, [number], state=state)
        assert client.started() == Started(0, None)
        assert client.ids() == alone(engine, [*words(40), number])
    assert state.token_count == 40


def test_a_long_prompt_lets_others_write(scheduler: Scheduler) -> None:
    long = Client(scheduler, words(100 * CHUNK))
    long.started()
    short = Client(scheduler, words(3))
    short.ids()
    assert long.events.empty()
    long.submission.cancel()


@pytest.mark.parametrize("when", ["waiting", "reading", "writing"])
def test_cancelling_frees_at_once(engine: Engine, scheduler: Scheduler, when: str) -> None:
    many = {"max_new_tokens": 10**6}
    busy = [Client(scheduler, words(5), sampling=many) for _ in range(3 + (when == "waiting"))]
    prompt = words(5) if when == "writing" else words(1000 * CHUNK)
    cancelled = Client(scheduler, prompt, sampling=many)
    if when != "waiting":
        cancelled.started()
    cancelled.submission.cancel()
    heard = cancelled.events.qsize()
    for client in busy:
        client.submission.cancel()
    assert Client(scheduler, words(9)).ids() == alone(engine, words(9))
    assert scheduler.running == scheduler.waiting == 0
    assert cancelled.events.qsize() <= heard + 1


def test_clients_take_turns(scheduler: Scheduler) -> None:
    many = {"max_new_tokens": 10**6}
    busy = [Client(scheduler, words(5), sampling=many) for _ in range(4)]
    for client in busy:
        client.started()
    order: list[str] = []
    sent = [
        scheduler.submit(
            Request(np.array([1]), Sampling(max_new_tokens=1), "m", name),
            lambda event, name=name: order.append(name) if isinstance(event, Started) else None,
        )
        for name in ["greedy", "greedy", "greedy", "modest"]
    ]
    busy[0].submission.cancel()
    deadline = time.monotonic() + 20
    while len(order) < len(sent) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert order == ["greedy", "modest", "greedy", "greedy"]
    for client in busy:
        client.submission.cancel()


def test_a_full_queue_refuses(engine: Engine) -> None:
    with Scheduler({"m": engine}, rows=1, queue=2) as scheduler:
        many = {"max_new_tokens": 10**6}
        Client(scheduler, words(5), sampling=many).started()
        for _ in range(2):
            Client(scheduler, words(5))
        with pytest.raises(OverloadError, match="2 requests wait already"):
            Client(scheduler, words(5))


def test_a_client_with_a_name_takes_half_of_the_queue(engine: Engine) -> None:
    with Scheduler({"m": engine}, rows=1, queue=4) as scheduler:
        many = {"max_new_tokens": 10**6}
        Client(scheduler, words(5), sampling=many).started()
        for _ in range(2):
            Client(scheduler, words(5), client="greedy")
        with pytest.raises(OverloadError, match="2 requests of this client wait already"):
            Client(scheduler, words(5), client="greedy")
        Client(scheduler, words(5), client="modest")


def test_what_cannot_be_served_is_refused_at_once(engine: Engine, scheduler: Scheduler) -> None:
    with pytest.raises(InputError, match="model 'x' is not served here, expected 'm', 'm:a'"):
        Client(scheduler, words(2), model="x")
    with pytest.raises(InputError, match="token 1000000"):
        Client(scheduler, [10**6])
    with pytest.raises(InputError, match="no token to continue from"):
        Client(scheduler, [])
    assert scheduler.running == scheduler.waiting == 0


def test_a_state_of_another_model_is_refused(scheduler: Scheduler) -> None:
    bundled = anymamba.load()
    state = bundled.prefill(bundled.state(), "ROMEO:")
    with pytest.raises(StateError):
        Client(scheduler, words(2), state=state)


def test_a_text_that_cannot_go_on_does_not_end_others(engine: Engine, scheduler: Scheduler) -> None:
    def nothing(ids: list[int], scores_v: np.ndarray) -> np.ndarray:
        return np.zeros(scores_v.shape, np.bool_)

    broken = Client(scheduler, words(5), sampling={"constraint": nothing})
    other = Client(scheduler, words(5))
    with pytest.raises(InputError, match="constraint allows no token"):
        broken.ids()
    assert other.ids() == alone(engine, words(5))
    assert Client(scheduler, words(6)).ids() == alone(engine, words(6))  # the next one too


def test_a_listener_that_fails_ends_its_text_only(engine: Engine, scheduler: Scheduler) -> None:
    def gone(event: object) -> None:
        raise RuntimeError("no connection")

    scheduler.submit(Request(np.array([1]), Sampling(max_new_tokens=10**6), "m"), gone)
    assert Client(scheduler, words(6)).ids() == alone(engine, words(6))


@pytest.mark.parametrize("seconds", [0.0, 30.0])
def test_closing(engine: Engine, seconds: float) -> None:
    """It lets finish what it has time for; what is left hears so."""
    scheduler = Scheduler({"m": engine}, rows=1)
    first = Client(scheduler, words(5), sampling={"max_new_tokens": 20 if seconds else 10**6})
    first.started()
    scheduler.close(seconds)
    if seconds:
        assert len(first.ids()) == 20
    else:
        with pytest.raises(OverloadError, match="shutting down"):
            first.ids()
    with pytest.raises(OverloadError, match="shutting down"):
        Client(scheduler, words(5))
    assert not scheduler._thread.is_alive()
