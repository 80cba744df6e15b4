"""Listening at an address until a signal comes."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette

from anymamba.errors import InputError


class _Server(uvicorn.Server):
    """Says where it listens once it does."""

    def __init__(self, config: uvicorn.Config, tell: Callable[[], object]) -> None:
        super().__init__(config)
        self._tell = tell

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._tell()


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
        InputError: there is no such address, or another program listens there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
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
    config = uvicorn.Config(application, timeout_graceful_shutdown=int(seconds), **options)
    with listening:
        _Server(config, lambda: tell(address)).run([listening])
