"""Several answers side by side: to start them, to collect them, to count their tokens."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from anymamba.runtime.generation import TokenOutput
from anymamba.runtime.serving import Request, Started
from anymamba.server.service import Service


@dataclass
class Usage:
    """How many tokens were read and written."""

    prompt: int
    cached: int = 0
    completion: int = 0


@dataclass
class Answers:
    """The answers to one request, of which each has its place.

    Args:
        service: runs them.
        requests: what is to be run.
        read_before: how many tokens a state had read that they continue from.
    """

    service: Service
    requests: Sequence[Request]
    read_before: int = 0
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    misses: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        prompts = {id(request.ids): request.ids.size for request in self.requests}
        self.usage = Usage(
            sum(prompts.values()) + self.read_before * len(prompts),
            cached=self.read_before * len(prompts),
        )
        self._events = self.service.events(self.requests)
        self._first: list[tuple[int, TokenOutput]] = []
        self._counted: set[int] = set()

    async def start(self) -> dict[str, str]:
        """Wait for the first answer to start; return the response's headers.

        Raises:
            ApiError: it cannot be served.
        """
        async for place, event in self._events:
            if isinstance(event, Started):
                self._note(place, event)
                break
        headers = {"x-anymamba-cached-tokens": str(self.usage.cached)}
        if self.misses:
            headers["x-anymamba-cache-miss"] = self.misses[0]
        return headers

    async def tokens(self) -> AsyncIterator[tuple[int, TokenOutput]]:
        """Each token of each answer, as it comes. Closing this cancels what is left."""
        try:
            async for place, event in self._events:
                if isinstance(event, Started):
                    self._note(place, event)
                elif isinstance(event, TokenOutput):
                    self.usage.completion += len(event.ids)
                    yield place, event
        finally:
            await self.close()

    async def collect(self) -> list[list[TokenOutput]]:
        """All tokens of each answer."""
        pieces: list[list[TokenOutput]] = [[] for _ in self.requests]
        async for place, piece in self.tokens():
            pieces[place].append(piece)
        return pieces

    async def close(self) -> None:
        """Cancel what is left."""
        await self._events.aclose()  # type: ignore[attr-defined]

    def _note(self, place: int, started: Started) -> None:
        ids = id(self.requests[place].ids)
        if ids not in self._counted:
            self._counted.add(ids)
            self.usage.cached += started.cached_tokens
            if started.miss is not None:
                self.misses.append(started.miss)
