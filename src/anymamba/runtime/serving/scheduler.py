"""One thread that owns the core, and lets any number of requests share it.

Requests wait in a queue for each client, and the clients take turns. An admitted request gets a
row of the batch: the longest beginning of its text that the cache knows is copied there, the rest
is read in chunks beside the other texts' tokens. What comes of a request goes to its listener, in
the scheduler's thread.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from anymamba.errors import AnyMambaError, InputError, OverloadError
from anymamba.runtime.engine import Engine
from anymamba.runtime.generation import Sampling, TokenGenerator, TokenOutput
from anymamba.runtime.serving.prefix_cache import PrefixCache
from anymamba.runtime.state import State


@dataclass(frozen=True)
class Request:
    """What a client wants.

    Args:
        ids: the text's tokens; with `state` those behind what it has read.
        sampling: how it is continued; None where it is only to be read.
        model: which of the scheduler's engines, by name.
        client: whose turn it is.
        state: what was read before. It stays as it is.
        keep_at: counts of tokens of `ids` after which the state is worth keeping, such as the ends
            of a chat's messages. The ends of the prompt and of the answer are kept in any case.
        row: which of several answers to one prompt this is; it draws with the seed `seed + row`.
    """

    ids: NDArray[np.int64]
    sampling: Sampling | None
    model: str
    client: str = ""
    state: State | None = None
    keep_at: Sequence[int] = ()
    row: int = 0


@dataclass(frozen=True)
class Started:
    """A request got a row.

    Args:
        cached_tokens: how many tokens need not be read again.
        miss: why not one more, as `Found` has it; None where nothing was missing or asked.
    """

    cached_tokens: int
    miss: str | None


Event: TypeAlias = Started | TokenOutput | State | AnyMambaError
"""What comes of a request: that it started, its tokens, of a text that is only read its state, or
what went wrong. The last token has a finish reason; after it, a state or an error nothing comes."""

Listener: TypeAlias = Callable[[Event], object]


@dataclass(eq=False)
class Submission:
    """A request on its way. `cancel` ends it, from any thread, within a step."""

    request: Request
    listener: Listener
    generator: TokenGenerator | None
    tokens: list[int] = field(default_factory=list)
    """All of the text's, those that were chosen among them."""
    keep_at: set[int] = field(default_factory=set)
    cancelled: bool = False

    def cancel(self) -> None:
        """End it: its row is free after the step that runs now, and nothing comes any more."""
        self.cancelled = True

    def tell(self, event: Event) -> None:
        """Let the listener know, unless nobody listens any more."""
        if self.cancelled:
            return
        try:
            self.listener(event)
        except Exception:  # a client that is gone may not end the others'
            self.cancelled = True


class _Lane:
    """An engine, the rows of its batch, and whose they are."""

    def __init__(self, engine: Engine, rows: int, chunk_tokens: int) -> None:
        self.engine = engine
        self.batch = engine.batch(rows, chunk_tokens)
        self.free = list(range(rows))
        self.running: dict[int, Submission] = {}

    def count(self, row: int) -> int:
        """How many tokens a row has read."""
        return int(self.batch.blocks.counts[row])

    def snapshot(self, row: int) -> State:
        """A copy of what a row has read."""
        return State(self.engine.identity, self.batch.blocks.take([row]))

    def restore(self, row: int, state: State | None) -> None:
        """Let a row go on from a state, or from nothing."""
        given = None if state is None else state.batch_of(self.engine.identity)
        blocks = self.batch.blocks
        blocks.conv[:, row] = 0 if given is None else given.conv[:, 0]
        blocks.ssm[:, row] = 0 if given is None else given.ssm[:, 0]
        blocks.counts[row] = 0 if given is None else given.counts[0]
        blocks.logits[row] = None if given is None else given.logits[0]

    def release(self, row: int) -> None:
        """Let another text have the row."""
        if row in self.batch.rows:
            self.batch.cancel(row)
        del self.running[row]
        self.free.append(row)


class Scheduler:
    """Serves requests by a thread of its own.

    Args:
        engines: the models by name; an adapter's has the name "base:adapter".
        rows: how many texts of a model are written at the same time.
        queue: how many requests wait at most.
        chunk_tokens: how much of all prompts is read between two tokens of the other texts.
        cache: states of texts that were read before.
        snapshot_tokens: after so many tokens of a long prompt each, its state is kept as well.

    Raises:
        InputError: a number makes no sense.

    Example:
        >>> import anymamba, queue
        >>> engine, events = anymamba.load(), queue.Queue()
        >>> with Scheduler({"bundled": engine}) as scheduler:
        ...     ids, sampling = engine.prompt_ids("ROMEO:"), Sampling(max_new_tokens=1)
        ...     _ = scheduler.submit(Request(ids, sampling, "bundled"), events.put)
        ...     events.get(), events.get().text
        (Started(cached_tokens=0, miss=None), '\\n')
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        *,
        rows: int = 16,
        queue: int = 256,
        chunk_tokens: int = 256,
        cache: PrefixCache | None = None,
        snapshot_tokens: int = 4096,
    ) -> None:
        for name, number in (
            ("rows", rows),
            ("queue", queue),
            ("chunk_tokens", chunk_tokens),
            ("snapshot_tokens", snapshot_tokens),
        ):
            if type(number) is not int or number < 1:
                raise InputError(f"{name} is {number!r}, expected a whole number from 1 up")
        self._lanes = {name: _Lane(engine, rows, chunk_tokens) for name, engine in engines.items()}
        self._cache = cache
        self._queue_size = queue
        self._snapshot_tokens = snapshot_tokens
        self._condition = threading.Condition()
        self._waiting: dict[str, deque[Submission]] = {}  # by client, the next one first
        self._is_closing, self._deadline = False, 0.0
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return sum(map(len, self._waiting.values()))

    @property
    def running(self) -> int:
        """How many texts are being written or read."""
        return sum(len(lane.running) for lane in self._lanes.values())

    def submit(self, request: Request, listener: Listener) -> Submission:
        """Take a request in.

        Args:
            request: what is wanted.
            listener: called in the scheduler's thread with each event; it must return at once.

        Raises:
            InputError: there is no such model, a token is not in its vocabulary, or nothing is
                there to continue.
            StateError: the state belongs to another model.
            OverloadError: too many requests wait, or the scheduler is closing.
        """
        lane = self._lanes.get(request.model)
        if lane is None:
            names = ", ".join(map(repr, self._lanes))
            raise InputError(f"model {request.model!r} is not served here, expected {names}")
        engine, state, ids = lane.engine, request.state, request.ids
        if state is not None:
            state.batch_of(engine.identity)
        lane.batch.check_tokens(ids)
        if not ids.size and (state is None or state.logits is None):
            raise InputError("there is no token to continue from: give a text of one token or more")
        generator = None
        if request.sampling is not None:
            generator = engine.token_generator(ids, request.sampling, request.row)
        submission = Submission(request, listener, generator)
        with self._condition:
            if self._is_closing:
                raise OverloadError("the server is shutting down: ask another, or later")
            if self.waiting >= self._queue_size:
                raise OverloadError(
                    f"{self._queue_size} requests wait already, the most that may: try again later"
                )
            self._waiting.setdefault(request.client, deque()).append(submission)
            self._condition.notify()
        return submission

    def close(self, seconds: float = 0.0) -> None:
        """Take nothing in any more, let what runs go on for so long, and end.

        What is not finished then gets an `OverloadError`.
        """
        with self._condition:
            self._is_closing = True
            self._deadline = time.monotonic() + seconds
            self._condition.notify()
        self._thread.join()

    def _run(self) -> None:
        reason: AnyMambaError = OverloadError("the server is shutting down: ask another, or later")
        try:
            while self._wait():
                self._admit()
                for lane in self._lanes.values():
                    if lane.running:
                        self._step(lane)
        except BaseException as error:
            reason = OverloadError(f"the server has failed: {error!r}")
            raise
        finally:
            with self._condition:
                self._is_closing = True
                waiting = [s for submissions in self._waiting.values() for s in submissions]
                self._waiting.clear()
            running = [s for lane in self._lanes.values() for s in lane.running.values()]
            for submission in waiting + running:
                submission.tell(reason)

    def _wait(self) -> bool:
        """Wait for work; False where there is to be no more."""
        with self._condition:
            while not (self._is_closing or self._waiting or self.running):
                self._condition.wait()
            if not self._is_closing:
                return True
            return bool(self._waiting or self.running) and time.monotonic() < self._deadline

    def _admit(self) -> None:
        """Free the rows of cancelled requests, and give free rows to those that wait."""
        for lane in self._lanes.values():
            for row in [row for row, running in lane.running.items() if running.cancelled]:
                lane.release(row)
        while (submission := self._next_waiting()) is not None:
            self._start(self._lanes[submission.request.model], submission)

    def _next_waiting(self) -> Submission | None:
        """Of the clients that wait, in turns, the first whose next request can have a row."""
        with self._condition:
            for client, submissions in list(self._waiting.items()):
                while submissions and submissions[0].cancelled:
                    submissions.popleft()
                if not submissions:
                    del self._waiting[client]
                elif self._lanes[submissions[0].request.model].free:
                    admitted = submissions.popleft()
                    del self._waiting[client]
                    if submissions:
                        self._waiting[client] = submissions  # behind the others
                    return admitted
        return None

    def _start(self, lane: _Lane, submission: Submission) -> None:
        """Copy what is known of the text into a free row, and let it read the rest."""
        request, row = submission.request, lane.free.pop()
        ids, state, started = request.ids, request.state, Started(0, None)
        if state is None and self._cache is not None:
            found = self._cache.find(request.model, ids, lane.engine.identity)
            ids, state, started = ids[found.count :], found.state, Started(found.count, found.miss)
        lane.restore(row, state)
        pauses = set(range(self._snapshot_tokens, ids.size, self._snapshot_tokens))
        if request.state is None and self._cache is not None:
            pauses |= {at - started.cached_tokens for at in request.keep_at}
            submission.tokens = request.ids.tolist()
            submission.keep_at = {
                started.cached_tokens + at for at in (*pauses, ids.size) if at > 0
            }
        lane.batch.add(row, ids, submission.generator, pauses)
        lane.running[row] = submission
        submission.tell(started)

    def _step(self, lane: _Lane) -> None:
        """Let all texts of a model advance by a step, and tell what came of it."""
        try:
            outcomes = lane.batch.step()
        except (AnyMambaError, MemoryError) as error:  # of the model or the machine: all end
            told = error if isinstance(error, AnyMambaError) else OverloadError("out of memory")
            for row, submission in list(lane.running.items()):
                lane.release(row)
                submission.tell(told)
            return
        for row, submission in lane.running.items():
            if (count := lane.count(row)) in submission.keep_at:
                submission.keep_at.remove(count)
                self._keep(lane, row, submission)
        for row, outcome in outcomes:
            submission = lane.running[row]
            if isinstance(outcome, TokenOutput) and submission.tokens:
                submission.tokens += outcome.ids
                if outcome.finish_reason is not None:
                    self._keep(lane, row, submission)
            event = lane.snapshot(row) if outcome is None else outcome
            if row not in lane.batch.rows:
                lane.release(row)
            submission.tell(event)

    def _keep(self, lane: _Lane, row: int, submission: Submission) -> None:
        """Keep what a row has read for texts that begin with it."""
        assert self._cache is not None
        ids = np.array(submission.tokens[: lane.count(row)], np.int64)
        self._cache.keep(submission.request.model, ids, lane.snapshot(row))
