"""Events of a stream: signs of life, errors, and what happens to one that nobody reads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from anymamba.errors import InputError
from anymamba.server import sse


def sent(objects: AsyncIterator[dict[str, Any]], hang_up_after: float = 60) -> list[bytes]:
    """The bodies that a stream's client gets, until it hangs up."""
    bodies: list[bytes] = []

    async def receive() -> dict[str, str]:
        await asyncio.sleep(hang_up_after)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            bodies.append(message["body"])
        else:
            headers = dict(message["headers"])
            assert headers[b"content-type"].startswith(b"text/event-stream")
            assert b"content-length" not in headers

    async def run() -> None:
        await sse.stream(objects, {})({"type": "http"}, receive, send)  # type: ignore[arg-type]

    asyncio.run(run())
    return bodies


def test_a_sign_of_life_while_nothing_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def slow() -> AsyncIterator[dict[str, Any]]:
        yield {"a": 1}
        await asyncio.sleep(0.25)
        yield {"a": 2}

    monkeypatch.setattr(sse, "PING_SECONDS", 0.1)
    first, *pings, second, end, last = sent(slow())
    assert (first, second) == (b'data: {"a":1}\n\n', b'data: {"a":2}\n\n')
    assert (set(pings), end, last) == ({b": ping\n\n"}, b"data: [DONE]\n\n", b"")
    assert len(pings) in (1, 2)


def test_an_error_is_the_last_event() -> None:
    async def failing() -> AsyncIterator[dict[str, Any]]:
        yield {"a": 1}
        raise InputError("broken")

    _, error, last = sent(failing())
    assert b'"message":"broken"' in error
    assert last == b""


def test_a_fault_is_raised() -> None:
    async def failing() -> AsyncIterator[dict[str, Any]]:
        yield {"a": 1}
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        sent(failing())


def test_hanging_up_closes_what_writes() -> None:
    closed = []

    async def endless() -> AsyncIterator[dict[str, Any]]:
        try:
            while True:
                yield {}
                await asyncio.sleep(0.01)
        finally:
            closed.append(True)

    assert sent(endless(), 0.05)
    assert closed == [True]
