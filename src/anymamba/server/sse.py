"""Server-sent events: objects as they come, and a sign of life while none does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import StreamingResponse

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
) -> StreamingResponse:
    """A response of JSON objects, each an event."""
    headers = {"cache-control": "no-cache", "x-accel-buffering": "no", **headers}
    events = _events(objects, form)
    return StreamingResponse(events, headers=headers, media_type="text/event-stream")


async def _events(
    objects: AsyncIterator[Mapping[str, Any]], form: EventForm
) -> AsyncIterator[bytes]:
    following = asyncio.ensure_future(anext(objects))
    try:
        while True:
            done, _ = await asyncio.wait({following}, timeout=PING_SECONDS)
            if not done:
                yield form.ping
                continue
            try:
                yield form.event(following.result())
            except StopAsyncIteration:
                yield form.end
                return
            except AnyMambaError as error:  # the status is sent already
                yield form.event(form.error(as_api_error(error)))
                return
            following = asyncio.ensure_future(anext(objects))
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await objects.aclose()  # type: ignore[attr-defined]
