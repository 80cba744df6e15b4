"""`/v1/responses`: answer a conversation that the server remembers."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from anymamba.runtime.chat.model_template import Message
from anymamba.server.chats.deltas import collect, new_id
from anymamba.server.chats.tool_fields import with_names
from anymamba.server.chats.turn import Turn, answer
from anymamba.server.errors import ApiError
from anymamba.server.fields import Fields, read_fields
from anymamba.server.openai.response_events import EVENTS, events
from anymamba.server.openai.response_items import input_of, tool_use_of
from anymamba.server.openai.response_output import Reply
from anymamba.server.openai.sampling import form_of, sampling_of
from anymamba.server.sampling import Schema, check_size, enforced
from anymamba.server.service import Service, unless_gone
from anymamba.server.sse import stream

_MOST_TOKENS = 1024
_LOGPROBS = "message.output_text.logprobs"


@dataclass(frozen=True)
class _Wanted:
    turn: Turn
    reply: Reply
    streams: bool


async def responses(http: HttpRequest) -> Response:
    """Answer a request."""
    service: Service = http.app.state.service
    fields = await read_fields(http, service.settings.body_bytes)
    wanted = await asyncio.to_thread(_read, fields, service)  # long texts, large schemas
    answers, headers = await answer(http, service, wanted.turn)
    if wanted.streams:
        found = events(wanted.turn, wanted.reply, answers)
        return stream(found, headers, EVENTS)
    (said,) = await unless_gone(http, collect(wanted.turn, answers))
    return JSONResponse(wanted.reply.finish(said, answers.usage), headers=headers)


async def show(http: HttpRequest) -> Response:
    """A response that was stored."""
    service: Service = http.app.state.service
    for name in http.query_params:
        message = f"{name[:100]!r} is not a parameter that is supported here: leave it out"
        raise ApiError(400, message, name[:100], "unsupported")
    return JSONResponse(service.responses.get(http.path_params["response"]).body)


async def remove(http: HttpRequest) -> Response:
    """Forget a response."""
    service: Service = http.app.state.service
    id = http.path_params["response"]
    service.responses.remove(id)
    return JSONResponse({"id": id, "object": "response", "deleted": True})


def _read(fields: Fields, service: Service) -> _Wanted:
    """What is wanted, with every field checked."""
    model, engine = service.engine(fields.text("model"))
    previous, instructions = fields.text("previous_response_id"), fields.text("instructions")
    said: list[Message] = []
    if previous is not None:
        said += service.responses.get(previous, "previous_response_id").messages
    said += input_of(fields)
    if not said:
        raise fields.refuse("input", [], "one item or more")
    said = with_names(said, "input")
    asked = said if instructions is None else [{"role": "system", "content": instructions}, *said]
    settings = Reply(
        id=new_id("resp"),
        model=model,
        engine=engine,
        created_at=int(time.time()),
        said=said,
        previous=previous,
        instructions=instructions,
        most_tokens=fields.integer("max_output_tokens", 1, service.settings.most_tokens),
        store=service.responses if fields.flag("store", True) else None,
    )
    top = _top_logprobs(fields)
    sampling = sampling_of(fields, settings.most_tokens or _MOST_TOKENS, top)
    check_size(service.settings.most_tokens, 1, sampling)
    described = {name: fields.peek(name) for name in ("tools", "tool_choice", "text")}
    tools, schema = tool_use_of(fields), _schema(fields)
    sampling = enforced(service, model, sampling, schema, tools, "text.format")
    if tools is not None and top is not None:
        message = "log-probabilities beside tools are not supported: ask for one of them"
        raise ApiError(400, message, "include", "unsupported")
    streams, metadata = _streams(fields), _metadata(fields)
    user = fields.text("safety_identifier") or fields.text("user")
    _refuse_what_is_not_there(fields)
    fields.done()
    reply = replace(
        settings,
        sampling=sampling,
        parallel=tools is None or tools.parallel,
        described=described,
        metadata=metadata,
        user=user,
    )
    reply.check()
    turn = Turn(model, engine, asked, sampling, tools, 1, user or "")
    return _Wanted(turn, reply, streams)


def _top_logprobs(fields: Fields) -> int | None:
    """How many alternatives each token is to have; None where none has a log-probability."""
    top, include = fields.integer("top_logprobs", 0, 20), fields.take("include", [])
    if include not in ([], [_LOGPROBS]):
        raise fields.refuse("include", include, f"at most {_LOGPROBS!r}")
    return (top or 0) if include else top or None


def _schema(fields: Fields) -> Schema | None:
    """The form that `text` asks for."""
    if (text := fields.inner("text")) is None:
        return None
    text.only("verbosity", "medium", "tell the model in words")
    schema = form_of(text.inner("format"))
    text.done()
    return schema


def _streams(fields: Fields) -> bool:
    if (options := fields.inner("stream_options")) is not None:
        options.only("include_obfuscation", False, "nothing is added to what is sent")
        options.done()
    return fields.flag("stream")


def _metadata(fields: Fields) -> dict[str, Any]:
    given = fields.take("metadata", {})
    fits = (
        isinstance(given, dict)
        and len(given) <= 16
        and all(len(key) <= 64 for key in given)
        and all(isinstance(value, str) and len(value) <= 512 for value in given.values())
    )
    if not fits:
        raise fields.refuse("metadata", given, "at most 16 short names and texts")
    return dict(given)


def _refuse_what_is_not_there(fields: Fields) -> None:
    """Fields that may say what is the case anyway, and nothing else."""
    fields.only("background", False, "an answer is given while the client waits")
    fields.only("truncation", "disabled", "a prompt is read as a whole")
    fields.choice("service_tier", ("auto", "default"))  # there is one
    fields.text("prompt_cache_key")  # all is kept for the next time anyway
