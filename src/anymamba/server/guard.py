"""Who may come in: whoever has the key, or without one whoever means this machine."""

from __future__ import annotations

import hmac
from ipaddress import ip_address

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from anymamba.server.errors import ApiError
from anymamba.server.page_files import is_page

_OPEN = ("/health",)
"""Paths that need no key, beside the page's."""


class Guard:
    """Lets in whoever has the key. The comparison takes the same time for every wrong one.

    Without a key, a server at this machine's own address answers only who calls it by such an
    address: a page in a browser may give its own host's name that address (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._refusal(scope) if scope["type"] == "http" else None
        if error is not None:
            headers = {"www-authenticate": "Bearer"} if error.status == 401 else None
            body = error.body_for(scope["path"])
            await JSONResponse(body, error.status, headers=headers)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))  # where it is mounted
        if path in _OPEN or is_page(path):
            return None
        headers = dict(scope["headers"])
        if self._key is not None:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            is_bearer = (
                hmac.compare_digest(given.strip(), self._key) and scheme.lower() == b"bearer"
            )
            if hmac.compare_digest(headers.get(b"x-api-key", b""), self._key) or is_bearer:
                return None
            message = (
                "the API key is missing or wrong: send it as 'Authorization: Bearer KEY' or "
                "'x-api-key: KEY'"
            )
            return ApiError(401, message, code="invalid_api_key")
        address = (scope.get("server") or ("",))[0]
        host = headers.get(b"host", b"").decode("latin-1")
        if not is_loopback(address) or is_loopback(_name_in(host)):
            return None
        message = f"the header host is {host[:100]!r}, expected 'localhost' or '127.0.0.1'"
        return ApiError(403, f"{message}: call it so, or start the server with an API key")


def _name_in(host: str) -> str:
    """A host's name or address without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own, which no other reaches.

    Example:
        >>> [is_loopback(host) for host in ("localhost", "127.0.0.1", "::1", "0.0.0.0", "a.org")]
        [True, True, True, False, False]
    """
    try:
        return host.lower() == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
