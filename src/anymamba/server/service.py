"""What every kind of request needs: the models, the scheduler, and events as they come."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from starlette.requests import Request as HttpRequest

from anymamba.errors import AnyMambaError, OverloadError
from anymamba.runtime.chat.model_template import ChatTemplate
from anymamba.runtime.engine import Engine
from anymamba.runtime.generation import Embedding, TokenOutput
from anymamba.runtime.generation.grammar import Grammars
from anymamba.runtime.serving import (
    Event,
    PrefixCache,
    Request,
    Scheduler,
    Started,
    StateFolder,
    Submission,
)
from anymamba.runtime.state import State
from anymamba.server.errors import ApiError, as_api_error
from anymamba.server.metrics import Followed, Metrics
from anymamba.server.stored_responses import StoredResponses
from anymamba.server.stored_states import StoredStates

T = TypeVar("T")
_MOST_UNREAD = 10_000
"""Events that a client has not taken yet; one that leaves more is not served further."""
Heard: TypeAlias = Started | TokenOutput | Embedding | State


@dataclass(frozen=True)
class Settings:
    """How a server serves.

    Args:
        api_key: what clients must send as a bearer token; None lets everybody in.
        parallel: how many texts of a model are written at the same time.
        queue: how many requests wait at most.
        chunk_tokens: how much of all prompts is read between two tokens of the other texts.
        cache_bytes: the memory for states of texts that were read before.
        cache_dir: a folder where they are kept as files too, over a restart.
        cache_dir_bytes: of files in it.
        body_bytes: of a request at most.
        prompt_tokens: of a prompt at most.
        most_tokens: how many tokens a request may ask for, of all its answers together; the
            alternatives that `logprobs` asks for count too.
        state_bytes: the memory for states that clients keep.
        response_bytes: the memory for responses that clients may ask for again.
        shutdown_seconds: how long what runs may go on once the server is to end.
        page: whether there is a page at `/` to chat in.
    """

    api_key: str | None = None
    parallel: int = 16
    queue: int = 256
    chunk_tokens: int = 256
    cache_bytes: int = 1 << 30
    cache_dir: Path | None = None
    cache_dir_bytes: int = 16 << 30
    body_bytes: int = 16 << 20
    prompt_tokens: int = 1 << 20
    most_tokens: int = 1 << 20
    state_bytes: int = 1 << 30
    response_bytes: int = 256 << 20
    shutdown_seconds: float = 30.0
    page: bool = True


class Service:
    """The models and who uses them.

    Args:
        engines: by the names that clients call them.
        templates: the chat templates of those that have one, by name.
        settings: how to serve.

    Raises:
        CheckpointError: the cache's folder cannot be used.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        templates: Mapping[str, ChatTemplate | None],
        settings: Settings,
    ) -> None:
        self.engines = dict(engines)
        self.templates = dict(templates)
        self.settings = settings
        self.started_at = int(time.time())
        self.states = StoredStates(settings.state_bytes)
        self.responses = StoredResponses(settings.response_bytes)
        self.metrics = Metrics(self.engines, self._gauges)
        self._grammars: dict[str, Grammars] = {}
        self._mail: _Mailbox | None = None
        self._cache: PrefixCache
        self._folder: StateFolder | None = None
        if settings.cache_dir is not None:
            self._folder = StateFolder(settings.cache_dir, settings.cache_dir_bytes)
        self.scheduler: Scheduler

    def start(self) -> None:
        """Begin to serve."""
        settings = self.settings
        if self._folder is not None:  # files tell models by it; computing it takes a while
            for engine in self.engines.values():
                _ = engine.identity.digest
        for template in {id(found): found for found in self.templates.values()}.values():
            if template is not None:
                with suppress(AnyMambaError):  # the first chat is told of it
                    template.start()
        self._cache = PrefixCache(settings.cache_bytes, self._folder)
        self.scheduler = Scheduler(
            self.engines,
            rows=settings.parallel,
            queue=settings.queue,
            chunk_tokens=settings.chunk_tokens,
            cache=self._cache,
            prompt_tokens=settings.prompt_tokens,
        )

    def stop(self, seconds: float | None = None) -> None:
        """Finish what runs as far as there is time, and write what is to be kept.

        Args:
            seconds: how much there is; by default what the settings say.
        """
        self.scheduler.close(self.settings.shutdown_seconds if seconds is None else seconds)
        for template in self.templates.values():
            if template is not None:
                template.close()
        if self._folder is not None:
            self._folder.close()

    def engine(self, name: str | None) -> tuple[str, Engine]:
        """The model of a request; the first where it names none.

        Raises:
            ApiError: there is no such model.
        """
        name = next(iter(self.engines)) if name is None else name
        if name not in self.engines:
            known = ", ".join(map(repr, self.engines))
            raise ApiError(
                404,
                f"model {name[:200]!r} is not served here, expected {known}",
                "model",
                "model_not_found",
            )
        return name, self.engines[name]

    def state_of(self, name: str | None, model: str) -> State | None:
        """The stored state that a request continues from, if it names one.

        Raises:
            ApiError: there is none of this name, or it belongs to another model.
        """
        if name is None:
            return None
        stored = self.states.get(name)
        if stored.model != model:
            message = f"state {name!r} belongs to model {stored.model!r}, and not to {model!r}"
            raise ApiError(400, message, "state", "state_of_another_model")
        return stored.state

    def grammars(self, model: str, param: str) -> Grammars:
        """What makes constraints for a model's texts, which the field `param` asks for.

        Raises:
            ApiError: it cannot have any.
        """
        engine = self.engines[model]
        if model not in self._grammars:
            try:
                self._grammars[model] = Grammars(
                    engine.tokenizer, engine.identity.vocabulary, engine.end_ids
                )
            except AnyMambaError as error:
                raise ApiError(501, str(error), param, "unsupported") from error
        return self._grammars[model]

    async def events(self, requests: Sequence[Request]) -> AsyncIterator[tuple[int, Heard]]:
        """Submit requests, and give out what comes of each by its place. Closing this cancels them.

        Further answers to a prompt (those with a row above 0) wait until the first has read it, and
        go on from the state that the cache then has.

        Raises:
            ApiError: one cannot be served, or went wrong, or nobody listens to what comes.
        """
        heard = asyncio.Queue[tuple[int, Event]]()
        sent = _Sent(self.scheduler, self.metrics, self._mailbox(), heard)
        waits = [request.row > 0 and request.state is None for request in requests]
        try:
            await asyncio.to_thread(sent.submit, requests, [not wait for wait in waits])
            left = len(requests)
            while left:
                place, event = await heard.get()
                if isinstance(event, AnyMambaError):
                    raise event
                yield place, event
                is_last = isinstance(event, State | Embedding)
                left -= is_last or bool(getattr(event, "finish_reason", None))
                if any(waits) and isinstance(event, TokenOutput):
                    ids = requests[place].ids
                    due = [
                        wait and request.ids is ids
                        for wait, request in zip(waits, requests, strict=True)
                    ]
                    waits = [wait and not now for wait, now in zip(waits, due, strict=True)]
                    await asyncio.to_thread(sent.submit, requests, due)
        except AnyMambaError as error:
            raise as_api_error(error) from error
        finally:
            sent.cancel()

    def _mailbox(self) -> _Mailbox:
        """That of the loop that runs."""
        loop = asyncio.get_running_loop()
        if self._mail is None or self._mail.loop is not loop:
            self._mail = _Mailbox(loop)
        return self._mail

    def _gauges(self) -> Iterator[tuple[str, str, dict[str, float]]]:
        """What there is at the moment, for `Metrics`."""
        loads = {model: self.scheduler.load(model) for model in self.engines}
        for name, says, values in (
            ("num_requests_running", "Texts that are being written or read.", 0),
            ("num_requests_waiting", "Requests that wait for their turn.", 1),
        ):
            yield f"vllm:{name}", says, {model: load[values] for model, load in loads.items()}
        rows = self.settings.parallel
        used = {model: running / rows for model, (running, _) in loads.items()}
        yield "vllm:kv_cache_usage_perc", "Of the rows for texts, the share that is in use.", used
        for name, says, value in (
            ("prefix_cache_bytes", "Memory of states of texts that were read.", self._cache.nbytes),
            ("prefix_cache_states", "How many such states there are.", len(self._cache)),
            ("stored_state_bytes", "Memory of states that clients keep.", self.states.nbytes),
        ):
            yield f"anymamba:{name}", says, {"": value}


class _Mailbox:
    """Brings events from the scheduler's thread to an event loop: those of a step all at once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._waiting: deque[tuple[asyncio.Queue[tuple[int, Event]], tuple[int, Event]]] = deque()
        self._is_due = False

    def put(self, heard: asyncio.Queue[tuple[int, Event]], event: tuple[int, Event]) -> None:
        """Let a queue of the loop have an event soon."""
        self._waiting.append((heard, event))
        if not self._is_due:
            self._is_due = True
            self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._is_due = False  # what comes from now on is delivered here or the next time
        while self._waiting:
            heard, event = self._waiting.popleft()
            heard.put_nowait(event)


class _Sent:
    """The requests of one client that were submitted, and what is heard of them."""

    def __init__(
        self,
        scheduler: Scheduler,
        metrics: Metrics,
        mailbox: _Mailbox,
        heard: asyncio.Queue[tuple[int, Event]],
    ) -> None:
        self._scheduler, self._metrics, self._heard = scheduler, metrics, heard
        self._followed: list[Followed] = []
        self._mailbox = mailbox
        self._submissions: list[Submission] = []
        self._is_over = False

    def submit(self, requests: Sequence[Request], due: Sequence[bool]) -> None:
        """Submit those that are due. This takes a while, and so is not for the event loop."""
        for place, request in enumerate(requests):
            if due[place]:
                followed = self._metrics.follow(request)
                listener = self._listener(place, followed)
                self._submissions.append(self._scheduler.submit(request, listener))
                self._followed.append(followed)
            if self._is_over:  # cancelled meanwhile
                self.cancel()
                return

    def cancel(self) -> None:
        """End them all, and those that are still to be submitted."""
        self._is_over = True
        for submission in self._submissions:
            submission.cancel()
        for followed in self._followed:
            followed.end()

    def _listener(self, place: int, followed: Followed) -> Callable[[Event], object]:
        def hear(event: Event) -> None:
            followed.hear(event)
            if self._heard.qsize() > _MOST_UNREAD:
                error = OverloadError("the client reads too slowly: the answer was given up")
                self._mailbox.put(self._heard, (place, error))
                raise error  # nothing more is told to a listener that fails
            self._mailbox.put(self._heard, (place, event))

        return hear


async def unless_gone(http: HttpRequest, answer: Coroutine[Any, Any, T]) -> T:
    """Wait for an answer, and give it up where the client hangs up.

    Raises:
        ApiError: the client is gone, or what the answer raises.
    """
    task, gone = asyncio.ensure_future(answer), asyncio.ensure_future(_hang_up(http))
    try:
        await asyncio.wait({gone, task}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(499, "the client has closed the connection")
    finally:
        for left in (gone, task):
            left.cancel()
        await asyncio.gather(gone, task, return_exceptions=True)


async def _hang_up(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
