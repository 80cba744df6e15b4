"""`/v1/models`, and texts as tokens."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from anymamba.errors import AnyMambaError
from anymamba.server.errors import ApiError, as_api_error
from anymamba.server.fields import read_fields
from anymamba.server.service import Service

_MOST_TOKENS = 1 << 20


async def models(http: HttpRequest) -> Response:
    """All models."""
    service: Service = http.app.state.service
    data = [_described(service, name) for name in service.engines]
    return JSONResponse({"object": "list", "data": data})


async def model(http: HttpRequest) -> Response:
    """One of them."""
    service: Service = http.app.state.service
    name, _ = service.engine(http.path_params["model"])
    return JSONResponse(_described(service, name))


async def tokenize(http: HttpRequest) -> Response:
    """The tokens of a text."""
    service: Service = http.app.state.service
    fields = await read_fields(http, service.settings.body_bytes)
    _, engine = service.engine(fields.text("model"))
    fields.require("prompt", "a text")
    text, special = fields.text("prompt") or "", fields.flag("add_special_tokens", True)
    fields.done()
    try:
        ids = await asyncio.to_thread(engine.tokenize, text, special)
    except AnyMambaError as error:
        raise ApiError(as_api_error(error).status, str(error), "prompt") from error
    return JSONResponse({"tokens": ids, "count": len(ids)})


async def detokenize(http: HttpRequest) -> Response:
    """The text of tokens."""
    service: Service = http.app.state.service
    fields = await read_fields(http, service.settings.body_bytes)
    _, engine = service.engine(fields.text("model"))
    fields.require("tokens", "a list of tokens")
    ids = fields.take("tokens")
    fields.done()
    most = engine.identity.vocabulary
    fits = (
        isinstance(ids, list)
        and len(ids) <= _MOST_TOKENS
        and all(type(id) is int and 0 <= id < most for id in ids)
    )
    if not fits:
        raise fields.refuse("tokens", ids, f"a list of whole numbers from 0 to {most - 1}")
    return JSONResponse({"prompt": await asyncio.to_thread(engine.detokenize, ids)})


def _described(service: Service, name: str) -> dict[str, Any]:
    engine = service.engines[name]
    return {
        "id": name,
        "object": "model",
        "created": service.started_at,
        "owned_by": "anymamba",
        "parameters": engine.n_parameters,
        "weights": engine.weight_type,
        "has_chat_template": service.templates.get(name) is not None,
    }
