"""The page at `/`: files of this package, which a browser may take from nowhere else."""

from __future__ import annotations

from pathlib import Path

from starlette.datastructures import MutableHeaders
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

FOLDER = Path(__file__).parent / "page"
AT = "/page/"
"""Under which path the files are; `/` is the page itself."""

# No script but these files, no other host, and no text that becomes HTML.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",  # a browser asks whether a file has changed
}


def routes() -> list[Route | Mount]:
    """Where the page and its files are."""
    files = _with_headers(StaticFiles(directory=FOLDER))
    return [Route("/", _Index(files), methods=["GET"]), Mount(AT.rstrip("/"), files)]


def is_page(path: str) -> bool:
    """Whether a path is the page's, which has no secrets: it asks for the key itself.

    Example:
        >>> [is_page(path) for path in ("/", "/page/style.css", "/v1/models")]
        [True, True, False]
    """
    return path == "/" or path.startswith(AT)


class _Index:
    """Answers with the page."""

    def __init__(self, files: ASGIApp) -> None:
        self._files = files

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        root = scope.get("root_path", "")
        await self._files({**scope, "path": f"{root}/index.html"}, receive, send)


def _with_headers(files: ASGIApp) -> ASGIApp:
    """Let each answer say what the browser may do with it."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await files(scope, receive, with_headers)

    return answer
