"""One thread that owns the core, and lets any number of requests share it.

Requests wait in a queue for each client, and the clients take turns. An admitted request gets a
row of the batch: the longest beginning of its text that the cache knows is copied there, the rest
is read in chunks beside the other texts' tokens. What comes of a request goes to its listener, in
the scheduler's thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping

import numpy as np

from anymamba.errors import AnyMambaError, InputError, OverloadError
from anymamba.runtime.engine import Engine
from anymamba.runtime.generation import Pooling, TokenGenerator, TokenOutput
from anymamba.runtime.generation.batch import Outcome
from anymamba.runtime.serving.prefix_cache import Found, PrefixCache
from anymamba.runtime.serving.request import Event, Listener, Request, Started, Submission
from anymamba.runtime.state import State

_LOGGER = logging.getLogger("anymamba.server")
_CLOSING = "the server is shutting down: try another server, or try again later"


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
        self.batch.blocks.logits[row] = None  # a view of the whole step's
        self.free.append(row)


class Scheduler:
    """Serves requests by a thread of its own.

    Args:
        engines: the models by name; an adapter's has the name "base:adapter".
        rows: how many texts of a model are written at the same time.
        queue: how many requests wait at most.
        chunk_tokens: how much of all prompts is read between two tokens of the other texts.
        cache: states of texts that were read before.
        snapshot_tokens: after so many tokens of a long prompt its state is kept as well, and again
            where it is twice as long each time: a prompt of any length takes a few states.
        prompt_tokens: how long a prompt may be.

    Raises:
        InputError: a number makes no sense.

    Example:
        >>> import anymamba, queue
        >>> from anymamba import Sampling
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
        prompt_tokens: int = 1 << 20,
    ) -> None:
        for name, number in (
            ("rows", rows),
            ("queue", queue),
            ("chunk_tokens", chunk_tokens),
            ("snapshot_tokens", snapshot_tokens),
            ("prompt_tokens", prompt_tokens),
        ):
            if type(number) is not int or number < 1:
                raise InputError(f"{name} is {number!r}, expected a whole number from 1 up")
        self._lanes = {name: _Lane(engine, rows, chunk_tokens) for name, engine in engines.items()}
        self._cache = cache
        self._queue_size = queue
        self._snapshot_tokens = snapshot_tokens
        self._prompt_tokens = prompt_tokens
        self._condition = threading.Condition()
        self._waiting: dict[str, deque[Submission]] = {}  # by client, the next one first
        self._is_closing, self._deadline = False, 0.0
        self._refusal = _CLOSING
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        with self._condition:
            return sum(map(len, self._waiting.values()))

    @property
    def running(self) -> int:
        """How many texts are being written or read."""
        return sum(len(lane.running) for lane in self._lanes.values())

    def load(self, model: str) -> tuple[int, int]:
        """How many texts of a model are written or read, and how many requests wait for it."""
        with self._condition:
            waiting = [s for submissions in self._waiting.values() for s in submissions]
        running = len(self._lanes[model].running)
        return running, sum(submission.request.model == model for submission in waiting)

    @property
    def failure(self) -> str | None:
        """Why nothing is served any more; None while all is well."""
        return None if self._refusal == _CLOSING else self._refusal

    def submit(self, request: Request, listener: Listener) -> Submission:
        """Take a request in.

        Args:
            request: what is wanted.
            listener: called in the scheduler's thread with each event; it must return at once.

        Raises:
            InputError: there is no such model, a token is not in its vocabulary, the text is too
                long, or nothing is there to continue.
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
        if ids.size > self._prompt_tokens:
            raise InputError(
                f"the text has {ids.size} tokens, expected at most {self._prompt_tokens}"
            )
        if not ids.size and (state is None or state.logits is None):
            raise InputError("there is no token to continue from: give a text of one token or more")
        generator: TokenGenerator | Pooling | None = request.pooling
        if request.sampling is not None:
            generator = engine.token_generator(ids, request.sampling, request.row)
        submission = Submission(request, listener, generator)
        with self._condition:
            if self._is_closing:
                raise OverloadError(self._refusal)
            if self.waiting >= self._queue_size:
                self._drop_cancelled()
            if self.waiting >= self._queue_size:
                raise OverloadError(
                    f"{self._queue_size} requests wait already, the most that may: try again later"
                )
            own = self._waiting.get(request.client, ())
            if request.client and 2 * len(own) >= self._queue_size > 1:
                raise OverloadError(
                    f"{len(own)} requests of this client wait already, half of all that may: try "
                    "again later"
                )
            self._waiting.setdefault(request.client, deque()).append(submission)
            self._condition.notify()
        return submission

    def close(self, seconds: float = 0.0) -> None:
        """Take nothing in any more, let running requests go on for that long, and end.

        What is not finished then gets an `OverloadError`.
        """
        with self._condition:
            deadline = time.monotonic() + seconds
            self._deadline = min(self._deadline, deadline) if self._is_closing else deadline
            self._is_closing = True
            self._condition.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._wait():
                self._admit()
                for lane in self._lanes.values():
                    if lane.running:
                        self._step(lane)
        except BaseException as error:
            self._refusal = f"the server has failed, and must be started again: {error!r}"
            raise
        finally:
            with self._condition:
                self._is_closing = True
                waiting = [s for submissions in self._waiting.values() for s in submissions]
                self._waiting.clear()
            running = [s for lane in self._lanes.values() for s in lane.running.values()]
            for lane in self._lanes.values():
                lane.running.clear()
            for submission in waiting + running:
                submission.tell(OverloadError(self._refusal))

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
        with self._condition:
            self._drop_cancelled()
        while (submission := self._next_waiting()) is not None:
            self._start(self._lanes[submission.request.model], submission)

    def _drop_cancelled(self) -> None:
        for client, submissions in list(self._waiting.items()):
            left = deque(waiting for waiting in submissions if not waiting.cancelled)
            if left:
                self._waiting[client] = left
            else:
                del self._waiting[client]

    def _next_waiting(self) -> Submission | None:
        """Of the clients that wait, in turns, the first whose next request can have a row."""
        with self._condition:
            for client, submissions in self._waiting.items():
                if self._lanes[submissions[0].request.model].free:
                    admitted = submissions.popleft()
                    del self._waiting[client]
                    if submissions:
                        self._waiting[client] = submissions  # behind the others
                    return admitted
        return None

    def _start(self, lane: _Lane, submission: Submission) -> None:
        """Give a text a free row, or tell why it cannot have one."""
        row = lane.free.pop()
        lane.running[row] = submission
        try:
            started = self._begin(lane, row, submission)
        except Exception as error:  # no memory for it, for one: the others go on
            lane.release(row)
            submission.tell(_as_told(error))
            return
        submission.tell(started)

    def _begin(self, lane: _Lane, row: int, submission: Submission) -> Started:
        """Copy what is known of the text into its row, and let it read the rest."""
        request = submission.request
        if request.state is not None or request.pooling is not None or self._cache is None:
            lane.restore(row, request.state)
            lane.batch.add(row, request.ids, submission.generator, (), request.scores)
            return Started(0, None)
        found = Found(None, 0, None)
        if request.scores is None:
            found = self._find(self._cache, lane, request)
        lane.restore(row, found.state)
        count, at = request.ids.size, self._snapshot_tokens
        snapshots = {at << i for i in range((count // at).bit_length())}
        submission.keep_at = {
            at for at in {*snapshots, *request.keep_at, count} if found.count < at <= count
        }
        pauses = [at - found.count for at in submission.keep_at]
        ids = request.ids[found.count :]
        lane.batch.add(row, ids, submission.generator, pauses, request.scores)
        return Started(found.count, found.miss)

    def _find(self, cache: PrefixCache, lane: _Lane, request: Request) -> Found:
        """What is known of a text: nothing, where to look for it goes wrong."""
        try:
            return cache.find(request.model, request.ids, lane.engine.identity)
        except Exception:
            _LOGGER.warning("the cache could not be read", exc_info=True)
            return Found(None, 0, "no such prefix")

    def _step(self, lane: _Lane) -> None:
        """Let all texts of a model advance by a step, and tell what came of it."""
        try:
            outcomes = lane.batch.step()
        except Exception as error:  # of the model or the machine: all end
            for row, submission in list(lane.running.items()):
                lane.release(row)
                submission.tell(_as_told(error))
            return
        going_on = set(lane.batch.rows)
        for row, outcome in outcomes:
            submission = lane.running[row]
            if isinstance(outcome, TokenOutput):
                submission.answer += outcome.ids
            if row in going_on:
                submission.tell(self._event(lane, row, outcome))
        kept = set()  # clients have their tokens before states are copied
        for row, submission in lane.running.items():
            if lane.count(row) in submission.keep_at:
                submission.keep_at.remove(lane.count(row))
                self._keep(lane, row, submission)
                kept.add(row)
        for row, outcome in outcomes:
            if row not in going_on:
                submission = lane.running[row]
                if isinstance(outcome, TokenOutput) and row not in kept:
                    self._keep(lane, row, submission)
                event = self._event(lane, row, outcome)
                lane.release(row)
                submission.tell(event)

    def _event(self, lane: _Lane, row: int, outcome: Outcome) -> Event:
        """What a text's client hears of what a step brought."""
        try:
            event = lane.snapshot(row) if outcome is None else outcome
        except Exception as error:
            event = error
        return _as_told(event) if isinstance(event, Exception) else event

    def _keep(self, lane: _Lane, row: int, submission: Submission) -> None:
        """Keep what a row has read for texts that begin with it, if it can be continued."""
        logits_v, request = lane.batch.blocks.logits[row], submission.request
        if self._cache is None or request.state is not None or logits_v is None:
            return
        try:
            if np.isfinite(logits_v.max()):
                key = submission.key_after(lane.count(row))
                self._cache.keep(request.model, key, lane.snapshot(row))
        except Exception:  # no memory for it, for one: it is read again
            _LOGGER.warning("a state could not be kept", exc_info=True)


def _as_told(error: Exception) -> AnyMambaError:
    """What a client hears of a fault."""
    if isinstance(error, AnyMambaError):
        return error
    if isinstance(error, MemoryError):
        return OverloadError("out of memory: try again later")
    _LOGGER.error("a request has failed", exc_info=error)
    return OverloadError(f"the request has failed: {error!r}")
