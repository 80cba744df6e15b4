"""Server-sent events: objects as they come, and a sign of life while none does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from anymamba.errors import AnyMambaError
from anymamba.server.errors import ApiError, as_api_error

PING_SECONDS = 15.0


@dataclass(frozen=True)
class EventForm:
    """What events look like.

    Args:
        has_names: whether each has the name that is its object's type.
        ping: the sign of life.
        end: what comes behind the last one.
        error: writes what went wrong.
    """

    has_names: bool
    ping: bytes
    end: bytes
    error: Callable[[ApiError], Mapping[str, Any]]

    def event(self, content: Mapping[str, Any]) -> bytes:
        """One event."""
        name = b"event: " + content["type"].encode() + b"\n" if self.has_names else b""
        data = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
        return name + b"data: " + data + b"\n\n"


PLAIN = EventForm(False, b": ping\n\n", b"data: [DONE]\n\n", ApiError.body)
"""OpenAI's for completions and chats."""


def stream(
    objects: AsyncIterator[Mapping[str, Any]], headers: Mapping[str, str], form: EventForm = PLAIN
) -> Response:
    """A response of JSON objects, each an event."""
    return _EventStream(objects, headers, form)


class _EventStream(Response):
    """Sends events as they come. A token costs no task and no timer of its own."""

    media_type = "text/event-stream"

    def __init__(
        self, objects: AsyncIterator[Mapping[str, Any]], headers: Mapping[str, str], form: EventForm
    ) -> None:
        self._objects, self._form = objects, form
        self.status_code, self.background, self.body = 200, None, b""
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        del self.headers["content-length"]
        self._sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        clock = asyncio.get_running_loop().time
        self._sent_at = clock()
        writing = asyncio.ensure_future(self._write(send, clock))
        gone = asyncio.ensure_future(_hang_up(receive))
        try:
            while not (writing.done() or gone.done()):
                left = self._sent_at + PING_SECONDS - clock()
                if left <= 0:
                    await self._send(send, clock, self._form.ping)
                else:
                    first = asyncio.FIRST_COMPLETED
                    await asyncio.wait({writing, gone}, timeout=left, return_when=first)
            if writing.done():
                await writing  # raises what it has raised
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            for task in (writing, gone):
                task.cancel()
            await asyncio.gather(writing, gone, return_exceptions=True)
            await self._objects.aclose()  # type: ignore[attr-defined]

    async def _write(self, send: Send, clock: Callable[[], float]) -> None:
        form = self._form
        try:
            async for content in self._objects:
                await self._send(send, clock, form.event(content))
        except AnyMambaError as error:  # the status is sent already
            await self._send(send, clock, form.event(form.error(as_api_error(error))))
        else:
            await self._send(send, clock, form.end)

    async def _send(self, send: Send, clock: Callable[[], float], body: bytes) -> None:
        self._sent_at = clock()
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
