"""`/v1/messages`: answer a conversation in Anthropic's form, and say how long it is."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from anymamba.server.answers import Answers, Usage
from anymamba.server.anthropic.conversation import messages_of, tool_use_of
from anymamba.server.chats.deltas import Said, collect, deltas, new_id
from anymamba.server.chats.turn import Turn, answer, prompt_of
from anymamba.server.errors import ApiError
from anymamba.server.fields import Fields, read_fields
from anymamba.server.sampling import (
    Schema,
    check_size,
    enforced,
    json_schema_of,
    sampling_from,
    stops_of,
)
from anymamba.server.service import Service, unless_gone
from anymamba.server.sse import EventForm, stream

_FIRST_VERSION = "2023-06-01"
"""Of the interface, in the header anthropic-version: the first whose streams have events."""
_MOST_STOPS = 16
_REASONS = {"eos": "end_turn", "stop": "stop_sequence", "length": "max_tokens", "calls": "tool_use"}
_PING = b'event: ping\ndata: {"type":"ping"}\n\n'
_EVENTS = EventForm(has_names=True, ping=_PING, end=b"", error=ApiError.anthropic_body)


@dataclass(frozen=True)
class _Wanted:
    turn: Turn
    streams: bool


async def messages(http: HttpRequest) -> Response:
    """Answer a request."""
    service: Service = http.app.state.service
    fields = await _fields(http, service)
    wanted = await asyncio.to_thread(_read, fields, service)  # long texts, large schemas
    answers, headers = await answer(http, service, wanted.turn)
    if wanted.streams:
        return stream(_events(wanted.turn, answers), headers, _EVENTS)
    (said,) = await unless_gone(http, collect(wanted.turn, answers))
    body = _body(wanted.turn, answers.usage, said)
    return JSONResponse(body, headers=headers)


async def count_tokens(http: HttpRequest) -> Response:
    """How many tokens the model would read for a request."""
    service: Service = http.app.state.service
    fields = await _fields(http, service)
    turn = await asyncio.to_thread(_read_conversation, fields, service, {"max_new_tokens": 1})
    fields.done()
    ids, _ = await asyncio.to_thread(prompt_of, service, turn)
    return JSONResponse({"input_tokens": ids.size})


async def _fields(http: HttpRequest, service: Service) -> Fields:
    version = http.headers.get("anthropic-version", _FIRST_VERSION)
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", version) or version < _FIRST_VERSION:
        message = f"the header anthropic-version is {version[:50]!r}, expected {_FIRST_VERSION!r}"
        raise ApiError(400, f"{message} or a later one")
    return await read_fields(http, service.settings.body_bytes)


def _read(fields: Fields, service: Service) -> _Wanted:
    """What is wanted, with every field checked."""
    fields.require("max_tokens", "how many tokens the answer may have")
    settings = {
        "max_new_tokens": fields.integer("max_tokens", 1, service.settings.most_tokens),
        "temperature": fields.number("temperature", 0, 1, 1.0),
        "top_p": fields.number("top_p", 0, 1),
        "top_k": fields.integer("top_k", 0, 1 << 31),
        "stop": stops_of(fields, "stop_sequences", _MOST_STOPS),
    }
    turn = _read_conversation(fields, service, settings)
    check_size(service.settings.most_tokens, 1, turn.sampling)
    streams = fields.flag("stream")
    fields.choice("service_tier", ("auto", "standard_only"))  # there is one
    fields.done()
    return _Wanted(turn, streams)


def _read_conversation(fields: Fields, service: Service, settings: dict[str, Any]) -> Turn:
    """What a count of tokens has too."""
    model, engine = service.engine(fields.text("model"))
    said, beginning = messages_of(fields)
    tools = tool_use_of(fields)
    sampling = enforced(
        service, model, sampling_from(settings), _schema(fields), tools, "output_config"
    )
    if (thinking := fields.inner("thinking")) is not None:
        thinking.only("type", "disabled", "the models do not think first")
        thinking.done()
    fields.inner("cache_control")  # all is kept for the next time anyway
    client = ""
    if (metadata := fields.inner("metadata")) is not None:
        client = metadata.text("user_id") or ""
        metadata.done()
    return Turn(model, engine, said, sampling, tools, 1, client, beginning)


def _schema(fields: Fields) -> Schema | None:
    """The form that `output_config` asks for."""
    if (config := fields.inner("output_config")) is None:
        return None
    schema = None
    if (form := config.inner("format")) is not None:
        form.require("type", "'json_schema'")
        form.only("type", "json_schema", "answers are text, or JSON by a schema")
        schema = json_schema_of(form)
        form.done()
    config.done()
    return schema


def _body(turn: Turn, usage: Usage, said: Said | None) -> dict[str, Any]:
    """The message, or how it begins."""
    content: list[dict[str, Any]] = []
    if said is not None:
        content += [{"type": "text", "text": said.text}] * bool(said.text)
        content += [_tool_use(call.name, call.parsed) for call in said.calls if call.is_whole]
    return {
        "id": new_id("msg"),
        "type": "message",
        "role": "assistant",
        "model": turn.model,
        "content": content,
        "stop_reason": None if said is None else _REASONS[said.ending],
        "stop_sequence": None if said is None else said.stop_string,
        "usage": _usage(usage),
    }


def _tool_use(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": new_id("toolu"), "name": name, "input": arguments}


def _usage(usage: Usage) -> dict[str, int]:
    """Tokens that were read are apart from those that came from the cache."""
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.completion,
    }


async def _events(turn: Turn, answers: Answers) -> AsyncIterator[dict[str, Any]]:
    yield {"type": "message_start", "message": _body(turn, answers.usage, None)}
    yield {"type": "ping"}
    said, blocks = Said(), _Blocks()
    async for delta in deltas(turn, answers):
        said.add(delta)
        if delta.text:
            for event in blocks.begin("text", {"type": "text", "text": ""}):
                yield event
            yield blocks.delta({"type": "text_delta", "text": delta.text})
        for part in delta.calls:
            if part.name is not None:
                for event in blocks.begin(f"call {part.index}", _tool_use(part.name, {})):
                    yield event
            if part.arguments:
                yield blocks.delta({"type": "input_json_delta", "partial_json": part.arguments})
    for event in blocks.end():
        yield event
    yield {
        "type": "message_delta",
        "delta": {"stop_reason": _REASONS[said.ending], "stop_sequence": said.stop_string},
        "usage": _usage(answers.usage),
    }
    yield {"type": "message_stop"}


class _Blocks:
    """The blocks of a stream, of which one is open at a time."""

    def __init__(self) -> None:
        self._index, self._open = -1, ""

    def begin(self, name: str, block: dict[str, Any]) -> list[dict[str, Any]]:
        """What begins a block, and ends the one before, unless this one is open already."""
        if name == self._open:
            return []
        events = self.end()
        self._index, self._open = self._index + 1, name
        begun = {"type": "content_block_start", "index": self._index, "content_block": block}
        return [*events, begun]

    def delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        """More of the open block."""
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def end(self) -> list[dict[str, Any]]:
        """What ends the open block, if there is one."""
        is_open, self._open = bool(self._open), ""
        return [{"type": "content_block_stop", "index": self._index}] * is_open
