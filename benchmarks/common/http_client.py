"""A client that takes little of the processor that it shares with the server."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Answer", "all_at_once", "ask"]

_DATA = b"data: "
_LINE = 1 << 24


@dataclass
class Answer:
    """What came back.

    Args:
        status: HTTP's.
        seconds: from the request's start to each event, or to the whole answer.
        body: of an answer that is not streamed.
        events: of one that is, each in JSON: reading them would take time from the server.
    """

    status: int
    seconds: list[float] = field(default_factory=list)
    body: dict[str, Any] = field(default_factory=dict)
    events: list[bytes] = field(default_factory=list)

    @property
    def text(self) -> str:
        """What was streamed."""
        choices = [choice for event in self.events for choice in json.loads(event)["choices"]]
        return "".join(choice["text"] for choice in choices)

    @property
    def cached(self) -> int:
        """How many tokens were not read again."""
        found: int = self.body["usage"]["prompt_tokens_details"]["cached_tokens"]
        return found


async def ask(
    port: int, body: object, path: str = "/v1/completions", hang_up_after: int | None = None
) -> Answer:
    """Send a request, and read all that comes, or so many events.

    Args:
        port: of the server on this machine.
        body: for JSON, or bytes that are sent as they are.
        path: of the request.
        hang_up_after: how many events are read before the connection is closed.
    """
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=_LINE)
    try:
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        answer = Answer(int((await reader.readline()).split()[1]))
        streams = False
        while (line := await reader.readline()) not in (b"\r\n", b""):
            streams = streams or line.lower().startswith(b"content-type: text/event-stream")
        if not streams:
            answer.body = json.loads(await reader.read())
            answer.seconds.append(time.perf_counter() - start)
            return answer
        while line := await reader.readline():
            if line.startswith(_DATA) and not line.startswith(b"data: [DONE]"):
                answer.seconds.append(time.perf_counter() - start)
                answer.events.append(line[len(_DATA) :])
                if len(answer.seconds) == hang_up_after:
                    break
        return answer
    finally:
        writer.close()


def all_at_once(port: int, bodies: Sequence[object]) -> list[Answer]:
    """Send all of them at the same time."""

    async def run() -> list[Answer]:
        return await asyncio.gather(*(ask(port, body) for body in bodies))

    return asyncio.run(run())
