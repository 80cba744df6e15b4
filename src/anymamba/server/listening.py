"""Listening at an address until a signal comes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette

from anymamba.errors import InputError

_LAST_SECONDS = 5
"""How long clients have to read what was said to them at the end."""


class _Server(uvicorn.Server):
    """Says where it listens once it does, and lets running answers end before it hangs up."""

    def __init__(
        self,
        config: uvicorn.Config,
        tell: Callable[[], object],
        stop: Callable[[float], object],
        seconds: float,
    ) -> None:
        super().__init__(config)
        self._tell, self._stop, self._seconds = tell, stop, seconds

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._tell()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        stopping = asyncio.ensure_future(asyncio.to_thread(self._stop, self._seconds))
        while not (stopping.done() or self.force_exit):
            await asyncio.wait({stopping}, timeout=0.1)
        if self.force_exit:  # the second Ctrl-C
            await asyncio.to_thread(self._stop, 0.0)
            self.force_exit = False  # all has ended; uvicorn would leave the rest with tracebacks
        await stopping
        await super().shutdown(sockets)


def listen(
    application: Starlette, host: str, port: int, seconds: float, tell: Callable[[str], object]
) -> None:
    """Serve until SIGINT or SIGTERM; then finish what runs, and take in nothing more.

    Args:
        application: what answers.
        host, port: where to listen; port 0 takes a free one.
        seconds: how long what runs may go on then.
        tell: called with the server's address once it listens.

    Raises:
        InputError: there is no such address, it is empty, or another program listens there.
    """
    if not host:
        raise InputError("the host is empty, expected an address such as '127.0.0.1'")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    # Windows would let a second server listen at the same address, unless it is told not to.
    exclusive = getattr(socket, "SO_EXCLUSIVEADDRUSE", None)
    listening.setsockopt(socket.SOL_SOCKET, exclusive or socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        reason = error.strerror or str(error)
        raise InputError(
            f"cannot listen at {host!r}, port {port}: {reason}; choose another by --host or --port"
        ) from error
    shown = f"[{host}]" if family == socket.AF_INET6 else host
    address = f"http://{shown}:{listening.getsockname()[1]}"
    options: dict[str, Any] = {"log_level": "warning", "server_header": False}
    config = uvicorn.Config(application, timeout_graceful_shutdown=_LAST_SECONDS, **options)
    stop = application.state.service.stop
    with listening:
        _Server(config, lambda: tell(address), stop, seconds).run([listening])
