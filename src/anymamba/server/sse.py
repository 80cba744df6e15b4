"""Server-sent events: objects as they come, and a sign of life while none does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.responses import StreamingResponse

from anymamba.errors import AnyMambaError
from anymamba.server.errors import as_api_error

PING_SECONDS = 15.0
_END = b"data: [DONE]\n\n"


def stream(
    objects: AsyncIterator[Mapping[str, Any]], headers: Mapping[str, str]
) -> StreamingResponse:
    """A response of JSON objects, each an event, and OpenAI's mark at the end."""
    headers = {"cache-control": "no-cache", "x-accel-buffering": "no", **headers}
    return StreamingResponse(_events(objects), headers=headers, media_type="text/event-stream")


def event(content: Mapping[str, Any]) -> bytes:
    """One event."""
    return (
        b"data: "
        + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
        + b"\n\n"
    )


async def _events(objects: AsyncIterator[Mapping[str, Any]]) -> AsyncIterator[bytes]:
    following = asyncio.ensure_future(anext(objects))
    try:
        while True:
            done, _ = await asyncio.wait({following}, timeout=PING_SECONDS)
            if not done:
                yield b": ping\n\n"
                continue
            try:
                yield event(following.result())
            except StopAsyncIteration:
                yield _END
                return
            except AnyMambaError as error:  # the status is sent already
                yield event(as_api_error(error).body())
                return
            following = asyncio.ensure_future(anext(objects))
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await objects.aclose()  # type: ignore[attr-defined]
