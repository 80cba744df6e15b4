"""What every kind of request needs: the models, the scheduler, and events as they come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from starlette.requests import Request as HttpRequest

from anymamba.errors import AnyMambaError
from anymamba.runtime.chat.model_template import ChatTemplate
from anymamba.runtime.engine import Engine
from anymamba.runtime.generation import TokenOutput
from anymamba.runtime.generation.grammar import Grammars
from anymamba.runtime.serving import (
    PrefixCache,
    Request,
    Scheduler,
    Started,
    StateFolder,
    Submission,
)
from anymamba.runtime.serving.scheduler import Event
from anymamba.runtime.state import State
from anymamba.server.errors import ApiError, as_api_error
from anymamba.server.stored_states import StoredStates

T = TypeVar("T")
Heard: TypeAlias = Started | TokenOutput | State


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
        most_tokens: how many tokens a request may ask for.
        state_bytes: the memory for states that clients keep.
        shutdown_seconds: how long what runs may go on once the server is to end.
    """

    api_key: str | None = None
    parallel: int = 16
    queue: int = 256
    chunk_tokens: int = 256
    cache_bytes: int = 1 << 30
    cache_dir: Path | None = None
    cache_dir_bytes: int = 16 << 30
    body_bytes: int = 16 << 20
    most_tokens: int = 1 << 20
    state_bytes: int = 1 << 30
    shutdown_seconds: float = 30.0


class Service:
    """The models and who uses them.

    Args:
        engines: by the names that clients call them.
        templates: the chat templates of those that have one, by name.
        settings: how to serve.
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
        self._grammars: dict[str, Grammars] = {}
        self._folder: StateFolder | None = None
        self.scheduler: Scheduler

    def start(self) -> None:
        """Begin to serve."""
        settings = self.settings
        if settings.cache_dir is not None:
            self._folder = StateFolder(settings.cache_dir, settings.cache_dir_bytes)
        self.scheduler = Scheduler(
            self.engines,
            rows=settings.parallel,
            queue=settings.queue,
            chunk_tokens=settings.chunk_tokens,
            cache=PrefixCache(settings.cache_bytes, self._folder),
        )

    def stop(self) -> None:
        """Finish what runs as far as there is time, and write what is to be kept."""
        self.scheduler.close(self.settings.shutdown_seconds)
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

    def grammars(self, model: str) -> Grammars:
        """What makes constraints for a model's texts.

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
                raise ApiError(501, str(error), "response_format", "unsupported") from error
        return self._grammars[model]

    async def events(self, requests: Sequence[Request]) -> AsyncIterator[tuple[int, Heard]]:
        """Submit requests, and give out what comes of each by its place. Closing this cancels them.

        Raises:
            ApiError: one cannot be served, or went wrong.
        """
        loop, heard = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event]]()

        def listener(place: int) -> Callable[[Event], object]:
            return lambda event: loop.call_soon_threadsafe(heard.put_nowait, (place, event))

        submissions: list[Submission] = []
        try:
            for place, request in enumerate(requests):
                submissions.append(self.scheduler.submit(request, listener(place)))
            left = len(requests)
            while left:
                place, event = await heard.get()
                if isinstance(event, AnyMambaError):
                    raise event
                yield place, event
                left -= isinstance(event, State) or bool(getattr(event, "finish_reason", None))
        except AnyMambaError as error:
            raise as_api_error(error) from error
        finally:
            for submission in submissions:
                submission.cancel()


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
