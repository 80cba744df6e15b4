"""`/v1/states`: what a model remembers of a text, as a thing that clients hold.

A text is read once; any number of completions and forks then go on from its state.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from anymamba.errors import AnyMambaError
from anymamba.runtime.engine import Engine
from anymamba.runtime.serving import Request
from anymamba.runtime.state import State
from anymamba.server.errors import ApiError, as_api_error
from anymamba.server.fields import check_type, read_bytes, read_fields
from anymamba.server.service import Service, unless_gone
from anymamba.server.stored_states import Stored

_FILE = "application/octet-stream"
_HEADER_BYTES = 1 << 16  # of such a file


async def create(http: HttpRequest) -> Response:
    """Read a text, from the beginning or on from another state, and keep what comes of it."""
    service: Service = http.app.state.service
    fields = await read_fields(http, service.settings.body_bytes)
    model, engine = service.engine(fields.text("model"))
    state = service.state_of(fields.text("state"), model)
    given = fields.take("input")
    if not isinstance(given, str | list):
        raise fields.refuse("input", given, "a text or its tokens")
    fields.done()
    service.states.check_room(_size_of(engine))
    try:
        ids = await asyncio.to_thread(engine.prompt_ids, given, state)
    except AnyMambaError as error:
        raise ApiError(as_api_error(error).status, str(error), "input") from error
    request = Request(ids, None, model, state=state)
    read = await unless_gone(http, _state_after(service, request))
    name = service.states.add(model, read)
    return JSONResponse(_described(name, service.states.get(name)), 201)


async def _state_after(service: Service, request: Request) -> State:
    async for _, event in service.events([request]):
        if isinstance(event, State):
            return event
    raise ApiError(500, "the text was not read")


async def show(http: HttpRequest) -> Response:
    """How large a state is, and of what."""
    service: Service = http.app.state.service
    name = http.path_params["state"]
    return JSONResponse(_described(name, service.states.get(name)))


async def fork(http: HttpRequest) -> Response:
    """Keep it under another id too. States never change: this costs nothing but the room."""
    service: Service = http.app.state.service
    stored = service.states.get(http.path_params["state"])
    name = service.states.add(stored.model, stored.state)
    return JSONResponse(_described(name, service.states.get(name)), 201)


async def remove(http: HttpRequest) -> Response:
    """Forget it."""
    service: Service = http.app.state.service
    name = http.path_params["state"]
    service.states.remove(name)
    return JSONResponse({"id": name, "object": "state", "deleted": True})


async def download(http: HttpRequest) -> Response:
    """Send a state as the file that `State.save` writes."""
    service: Service = http.app.state.service
    stored = service.states.get(http.path_params["state"])
    return Response(await asyncio.to_thread(_written, stored.state), media_type=_FILE)


async def upload(http: HttpRequest) -> Response:
    """Keep a state that such a file holds, of the model that the query names."""
    service: Service = http.app.state.service
    model, engine = service.engine(http.query_params.get("model"))
    check_type(http, _FILE)
    service.states.check_room(_size_of(engine))
    data = await read_bytes(http, _size_of(engine) + _HEADER_BYTES, "the file")
    state = await asyncio.to_thread(_read, engine, data)
    name = service.states.add(model, state)
    return JSONResponse(_described(name, service.states.get(name)), 201)


def _size_of(engine: Engine) -> int:
    """How many bytes each state of a model takes that says what comes next."""
    return State(engine.identity).nbytes + 4 * engine.identity.vocabulary


def _written(state: State) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "state"
        state.save(file)
        return file.read_bytes()


def _read(engine: Engine, data: bytes) -> State:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "state"
        file.write_bytes(data)
        try:
            return engine.load_state(file).copy()  # the file goes
        except AnyMambaError as error:
            message = str(error).replace(repr(str(file)), "sent")
            raise ApiError(400, message, code="invalid_state") from error


def _described(name: str, stored: Stored) -> dict[str, Any]:
    return {
        "id": name,
        "object": "state",
        "model": stored.model,
        "tokens": stored.state.token_count,
        "bytes": stored.state.nbytes,
    }
