"""The ASGI application: who may come in, and which function answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from anymamba.errors import AnyMambaError
from anymamba.runtime.chat.model_template import ChatTemplate
from anymamba.runtime.engine import Engine
from anymamba.server import page_files, states
from anymamba.server.anthropic import messages
from anymamba.server.errors import ApiError, answer_error, answer_fault
from anymamba.server.guard import Guard
from anymamba.server.openai import chat, completions, embeddings, models, responses
from anymamba.server.service import Service, Settings


def app(
    engines: Engine | Mapping[str, Engine],
    templates: Mapping[str, ChatTemplate | None] | None = None,
    settings: Settings | None = None,
) -> Starlette:
    """Make an application that serves models.

    Args:
        engines: one engine, which clients call "anymamba", or several by name; "base:adapter" is
            the name of an adapter's.
        templates: the chat templates, by the same names.
        settings: how to serve.

    Returns:
        The application, for any ASGI server. It computes from its start to its shutdown.

    Example:
        >>> import anymamba
        >>> from starlette.testclient import TestClient
        >>> with TestClient(app(anymamba.load())) as client:
        ...     body = {"prompt": "ROMEO:", "max_tokens": 5, "temperature": 0}
        ...     client.post("/v1/completions", json=body).json()["choices"][0]["text"]
        '\\nI wo'
    """
    named = {"anymamba": engines} if isinstance(engines, Engine) else engines
    service = Service(named, templates or {}, settings or Settings())

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.stop)

    application = Starlette(
        routes=_routes(service.settings.page),
        middleware=[Middleware(Guard, api_key=service.settings.api_key)],
        exception_handlers={
            AnyMambaError: answer_error,
            HTTPException: _answer_http_error,
            Exception: answer_fault,
        },
        lifespan=lifespan,
    )
    application.state.service = service
    return application


def _routes(with_page: bool) -> list[BaseRoute]:
    post: list[tuple[str, Callable[..., Any]]] = [
        ("/v1/completions", completions.completions),
        ("/v1/chat/completions", chat.chat_completions),
        ("/v1/embeddings", embeddings.embeddings),
        ("/v1/responses", responses.responses),
        ("/v1/messages", messages.messages),
        ("/v1/messages/count_tokens", messages.count_tokens),
        ("/tokenize", models.tokenize),
        ("/detokenize", models.detokenize),
        ("/v1/states", states.create),
        ("/v1/states/file", states.upload),
        ("/v1/states/{state}/fork", states.fork),
    ]
    get: list[tuple[str, Callable[..., Any]]] = [
        ("/health", health),
        ("/metrics", metrics),
        ("/v1/models", models.models),
        ("/v1/models/{model:path}", models.model),
        ("/v1/responses/{response}", responses.show),
        ("/v1/states/{state}", states.show),
        ("/v1/states/{state}/file", states.download),
    ]
    return [
        *(Route(path, function, methods=["POST"]) for path, function in post),
        *(Route(path, function, methods=["GET"]) for path, function in get),
        Route("/v1/responses/{response}", responses.remove, methods=["DELETE"]),
        Route("/v1/states/{state}", states.remove, methods=["DELETE"]),
        *(page_files.routes() if with_page else []),
    ]


async def health(http: Request) -> Response:
    """Whether the server takes requests, and how busy it is."""
    scheduler = http.app.state.service.scheduler
    status = scheduler.failure or "ok"
    body = {"status": status, "running": scheduler.running, "waiting": scheduler.waiting}
    return JSONResponse(body, 200 if status == "ok" else 503)


async def metrics(http: Request) -> Response:
    """What was done, for Prometheus."""
    try:
        text, kind = http.app.state.service.metrics.text()
    except ModuleNotFoundError as error:
        message = "metrics need prometheus_client: pip install 'anymamba[server]'"
        raise ApiError(501, message, code="unsupported") from error
    return Response(text, headers={"content-type": kind})


async def _answer_http_error(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{http.method} {http.url.path[:200]}: {error.detail}"
    body = ApiError(error.status_code, message).body_for(http.url.path)
    return JSONResponse(body, error.status_code, headers=error.headers)
