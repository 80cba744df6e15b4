"""`/v1/chat/completions`: answer a conversation, by the model's own template."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from anymamba.runtime.chat.model_template import Message
from anymamba.runtime.chat.tool_grammar import ToolUse
from anymamba.runtime.chat.tools import Tool
from anymamba.runtime.generation import TokenOutput
from anymamba.server.answers import Answers
from anymamba.server.chats.deltas import Delta, Said, collect, deltas, new_id
from anymamba.server.chats.tool_fields import (
    MOST_TOOLS,
    arguments_of,
    call_of,
    name_of,
    tool_of,
    tool_use,
    with_names,
)
from anymamba.server.chats.turn import MOST_MESSAGES, Turn, answer
from anymamba.server.errors import ApiError
from anymamba.server.fields import Fields, read_fields
from anymamba.server.openai import logprobs
from anymamba.server.openai.sampling import (
    FINISH_REASONS,
    MOST_CHOICES,
    sampling_of,
    schema_of,
    streaming_of,
    usage_body,
)
from anymamba.server.sampling import check_size, enforced
from anymamba.server.service import Service, unless_gone
from anymamba.server.sse import stream

_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class _Wanted:
    turn: Turn
    streams: bool
    with_usage: bool


async def chat_completions(http: HttpRequest) -> Response:
    """Answer a request."""
    service: Service = http.app.state.service
    fields = await read_fields(http, service.settings.body_bytes)
    wanted = await asyncio.to_thread(_read, fields, service)  # long texts, large schemas
    turn = wanted.turn
    answers, headers = await answer(http, service, turn)
    if wanted.streams:
        return stream(_chunks(wanted, answers), headers)
    said = await unless_gone(http, collect(turn, answers))
    choices = [_choice(turn, place, found) for place, found in enumerate(said)]
    body = _body(turn, answers, "chat.completion", choices) | {"usage": usage_body(answers.usage)}
    return JSONResponse(body, headers=headers)


def _read(fields: Fields, service: Service) -> _Wanted:
    """What is wanted, with every field checked."""
    model, engine = service.engine(fields.text("model"))
    fields.require("messages", "a list of messages")
    messages = [_message(message) for message in fields.objects("messages", MOST_MESSAGES)]
    if not messages:
        raise fields.refuse("messages", [], "one message or more")
    messages = with_names(messages, "messages")
    n = fields.integer("n", 1, MOST_CHOICES, 1) or 1
    has_logprobs, top = fields.flag("logprobs"), fields.integer("top_logprobs", 0, 20)
    if top is not None and not has_logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", "top_logprobs")
    older = fields.integer("max_tokens", 1, service.settings.most_tokens)
    most = fields.integer("max_completion_tokens", 1, service.settings.most_tokens, older) or 1024
    sampling = sampling_of(fields, most, (top or 0) if has_logprobs else None)
    check_size(service.settings.most_tokens, n, sampling)
    tools = _tools(fields)
    schema = schema_of(fields.inner("response_format"))
    sampling = enforced(service, model, sampling, schema, tools)
    streams, with_usage = streaming_of(fields)
    fields.only("modalities", ["text"], "the models read and write text")
    fields.only("store", False, "nothing is stored here, only by /v1/responses")
    client = fields.text("safety_identifier") or fields.text("user") or ""
    fields.done()
    turn = Turn(model, engine, messages, sampling, tools, n, client)
    return _Wanted(turn, streams, with_usage)


def _message(fields: Fields) -> Message:
    """A message as templates take it: a role, a text, and calls of tools."""
    fields.require("role", "who says it")
    role = fields.choice("role", _ROLES) or ""
    message: Message = {"role": "system" if role == "developer" else role}
    message["content"] = text_of(fields, "content", ("text",))
    fields.take("name")  # templates that know names are rare, and OpenAI's models ignore it too
    if role == "assistant":
        fields.only("refusal", "", "what the assistant said is its content")
        calls = [_call(call) for call in fields.objects("tool_calls", MOST_TOOLS)]
        if calls:
            message["tool_calls"] = calls
    elif role == "tool":
        fields.require("tool_call_id", "the id of the call whose result this is")
        message["tool_call_id"] = fields.text("tool_call_id")
    fields.done()
    return message


def text_of(fields: Fields, name: str, kinds: Sequence[str]) -> str:
    """A text, or a list of parts that are texts."""
    given = fields.take(name, "")
    if isinstance(given, str):
        return given
    expected = f"a text, or a list of parts of type {' or '.join(kinds)}"
    texts = []
    for part in given if isinstance(given, list) else [given]:
        is_text = isinstance(part, dict) and part.get("type") in kinds
        if not is_text or not isinstance(part.get("text"), str):
            raise fields.refuse(name, part, expected)
        texts.append(part["text"])
    return "".join(texts)


def _call(fields: Fields) -> dict[str, Any]:
    fields.require("id", "the call's id")
    id = fields.text("id") or ""
    function = _function(fields)
    call = call_of(id, name_of(function), arguments_of(function, "arguments"))
    function.done()
    fields.done()
    return call


def _function(fields: Fields) -> Fields:
    """What an object of the type "function" describes."""
    kind = fields.take("type")
    if kind != "function":
        raise fields.refuse("type", kind, "'function', the only one that is supported")
    fields.require("function", "a function")
    function = fields.inner("function")
    assert function is not None
    return function


def _tools(fields: Fields) -> ToolUse | None:
    tools = [_tool(tool) for tool in fields.objects("tools", MOST_TOOLS)]
    mode, only = tool_choice_of(fields, _chosen)
    return tool_use(tools, mode, only, fields.flag("parallel_tool_calls", True))


def _tool(fields: Fields) -> Tool:
    function = _function(fields)
    tool = tool_of(function)
    function.done()
    fields.done()
    return tool


def _chosen(fields: Fields) -> str:
    function = _function(fields)
    name = name_of(function)
    function.done()
    return name


def tool_choice_of(
    fields: Fields, named: Callable[[Fields], str]
) -> tuple[Literal["none", "auto", "required"] | None, str | None]:
    """How tools may be used, and which one must be; `named` reads an object that names it."""
    given = fields.take("tool_choice", None)
    if given in (None, "none", "auto", "required"):
        return given, None
    if not isinstance(given, dict):
        expected = "'none', 'auto', 'required' or an object that names a function"
        raise fields.refuse("tool_choice", given, expected)
    inner = Fields(given, "tool_choice.")
    name = named(inner)
    inner.done()
    return "required", name


def _choice(turn: Turn, place: int, said: Said) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": said.text, "refusal": None}
    if said.calls:
        function = [{"name": call.name, "arguments": call.arguments} for call in said.calls]
        message["content"] = said.text or None
        message["tool_calls"] = [
            {"id": new_id("call"), "type": "function", "function": one} for one in function
        ]
    return {"index": place, "message": message, **_ending(turn, said.pieces, said.ending)}


def _ending(turn: Turn, pieces: Sequence[TokenOutput], ending: str | None) -> dict[str, Any]:
    has_logprobs = turn.sampling.top_logprobs is not None
    return {
        "logprobs": logprobs.of_chat(turn.engine, pieces) if has_logprobs else None,
        "finish_reason": FINISH_REASONS[ending],
    }


def _body(turn: Turn, answers: Answers, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{answers.id}",
        "object": name,
        "created": answers.created,
        "model": turn.model,
        "choices": choices,
    }


async def _chunks(wanted: _Wanted, answers: Answers) -> AsyncIterator[dict[str, Any]]:
    name, turn = "chat.completion.chunk", wanted.turn
    begun: set[int] = set()
    async for delta in deltas(turn, answers):
        content = _delta(delta)
        if delta.place not in begun:
            content = {"role": "assistant", **content}
        begun.add(delta.place)
        ending = _ending(turn, [delta.piece], delta.ending)
        choice = {"index": delta.place, "delta": content, **ending}
        yield _body(turn, answers, name, [choice])
    if wanted.with_usage:
        yield _body(turn, answers, name, []) | {"usage": usage_body(answers.usage)}


def _delta(delta: Delta) -> dict[str, Any]:
    if not delta.calls:
        return {"content": delta.text}
    parts: list[dict[str, Any]] = []
    for part in delta.calls:
        begins = {} if part.name is None else {"id": new_id("call"), "type": "function"}
        function = {} if part.name is None else {"name": part.name}
        if part.name is not None or part.arguments:
            function = {**function, "arguments": part.arguments}
            parts.append({"index": part.index, **begins, "function": function})
    content = {"content": delta.text} if delta.text else {}
    return {**content, **({"tool_calls": parts} if parts else {})}
