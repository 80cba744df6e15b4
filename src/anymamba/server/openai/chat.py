"""`/v1/chat/completions`: answer a conversation, by the model's own template."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from anymamba.errors import AnyMambaError, InputError
from anymamba.runtime.chat.model_template import Message
from anymamba.runtime.engine import Engine
from anymamba.runtime.generation import Sampling, TokenOutput
from anymamba.runtime.serving import Request
from anymamba.server.errors import ApiError, as_api_error
from anymamba.server.fields import Fields, read_fields
from anymamba.server.openai import logprobs
from anymamba.server.openai.answers import FINISH_REASONS, Answers
from anymamba.server.openai.sampling import (
    MOST_CHOICES,
    check_size,
    constrained,
    for_row,
    sampling_of,
    streaming_of,
)
from anymamba.server.service import Service, unless_gone
from anymamba.server.sse import stream

MOST_MESSAGES = 10_000
_ROLES = ("system", "developer", "user", "assistant")


@dataclass(frozen=True)
class _Wanted:
    model: str
    engine: Engine
    messages: list[Message]
    n: int
    sampling: Sampling
    streams: bool
    with_usage: bool
    client: str


async def chat_completions(http: HttpRequest) -> Response:
    """Answer a request."""
    service: Service = http.app.state.service
    fields = await read_fields(http, service.settings.body_bytes)
    wanted = await asyncio.to_thread(_read, fields, service)  # long texts, large schemas
    ids, keep_at = await asyncio.to_thread(prompt_of, service, wanted.model, wanted.messages)
    requests = [
        Request(
            ids, for_row(wanted.sampling), wanted.model, wanted.client, keep_at=keep_at, row=row
        )
        for row in range(wanted.n)
    ]
    answers = Answers(service, requests)
    headers = await unless_gone(http, answers.start())
    if wanted.streams:
        return stream(_chunks(wanted, answers), headers)
    pieces = await unless_gone(http, answers.collect())
    choices = [_choice(wanted, place, found) for place, found in enumerate(pieces)]
    body = _body(wanted, answers, "chat.completion", choices) | {"usage": answers.usage.body()}
    return JSONResponse(body, headers=headers)


def prompt_of(
    service: Service, model: str, messages: Sequence[Message]
) -> tuple[NDArray[np.int64], list[int]]:
    """A conversation as tokens, up to where the answer begins.

    Returns:
        The tokens; and after how many of them the instructions end, with which other conversations
        may begin too.

    Raises:
        ApiError: the model has no chat template, or it refuses the messages.
    """
    template = service.templates.get(model)
    if template is None:
        raise ApiError(
            400,
            f"model {model!r} has no chat template, so that nobody knows how it writes a "
            "conversation: use /v1/completions",
            "model",
            "no_chat_template",
        )
    try:
        text = template.render(messages)
        # A template writes what special tokens there are to be.
        ids = service.engines[model].tokenize(text, special=False)
    except AnyMambaError as error:
        param = "messages" if isinstance(error, InputError) else None
        raise ApiError(as_api_error(error).status, str(error), param) from error
    if not ids:
        raise ApiError(400, "the messages make no text: say something in one of them", "messages")
    instructions = _instructions(text, messages)
    begin = service.engines[model].tokenize(instructions, special=False) if instructions else []
    return np.array(ids, np.int64), [len(begin)] if begin and ids[: len(begin)] == begin else []


def _instructions(text: str, messages: Sequence[Message]) -> str:
    """A conversation's text up to where what the system says first ends, as far as that shows."""
    leading = list(takewhile(lambda message: message["role"] == "system", messages))
    said = leading[-1]["content"].strip() if leading else ""
    return text[: text.find(said) + len(said)] if said in text else ""


def _read(fields: Fields, service: Service) -> _Wanted:
    """What is wanted, with every field checked."""
    model, engine = service.engine(fields.text("model"))
    fields.require("messages", "a list of messages")
    messages = [_message(message) for message in fields.objects("messages", MOST_MESSAGES)]
    if not messages:
        raise fields.refuse("messages", [], "one message or more")
    n = fields.integer("n", 1, MOST_CHOICES, 1) or 1
    has_logprobs, top = fields.flag("logprobs"), fields.integer("top_logprobs", 0, 20)
    if top is not None and not has_logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", "top_logprobs")
    older = fields.integer("max_tokens", 1, service.settings.most_tokens)
    most = fields.integer("max_completion_tokens", 1, service.settings.most_tokens, older) or 1024
    sampling = sampling_of(fields, most, (top or 0) if has_logprobs else None)
    check_size(service.settings.most_tokens, n, sampling)
    if (form := fields.inner("response_format")) is not None:
        sampling = constrained(sampling, form, service.grammars(model))
    streams, with_usage = streaming_of(fields)
    fields.only("modalities", ["text"], "the models read and write text")
    fields.only("store", False, "nothing is stored")
    client = fields.text("safety_identifier") or fields.text("user") or ""
    fields.done()
    return _Wanted(model, engine, messages, n, sampling, streams, with_usage, client)


def _message(fields: Fields) -> Message:
    """A message as templates take it: a role and a text."""
    fields.require("role", "who says it")
    role = fields.choice("role", _ROLES) or ""
    given = fields.take("content", "")
    parts = given if isinstance(given, list) else [{"type": "text", "text": given}]
    texts = []
    for part in parts:
        is_text = isinstance(part, dict) and part.get("type") == "text"
        if not is_text or not isinstance(part.get("text"), str):
            raise fields.refuse("content", part, "a text, or a list of parts of type text")
        texts.append(part["text"])
    fields.take("name")  # templates that know names are rare, and OpenAI's models ignore it too
    fields.done()
    return {"role": "system" if role == "developer" else role, "content": "".join(texts)}


def _choice(wanted: _Wanted, place: int, pieces: Sequence[TokenOutput]) -> dict[str, Any]:
    message = {
        "role": "assistant",
        "content": "".join(piece.text for piece in pieces),
        "refusal": None,
    }
    return {"index": place, "message": message, **_ending(wanted, pieces)}


def _ending(wanted: _Wanted, pieces: Sequence[TokenOutput]) -> dict[str, Any]:
    has_logprobs = wanted.sampling.top_logprobs is not None
    return {
        "logprobs": logprobs.of_chat(wanted.engine, pieces) if has_logprobs else None,
        "finish_reason": FINISH_REASONS[pieces[-1].finish_reason],
    }


def _body(
    wanted: _Wanted, answers: Answers, name: str, choices: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{answers.id}",
        "object": name,
        "created": answers.created,
        "model": wanted.model,
        "choices": choices,
    }


async def _chunks(wanted: _Wanted, answers: Answers) -> AsyncIterator[dict[str, Any]]:
    name = "chat.completion.chunk"
    begun: set[int] = set()
    async for place, piece in answers.tokens():
        delta: dict[str, Any] = {"content": piece.text}
        if place not in begun:
            delta = {"role": "assistant", **delta}
        begun.add(place)
        choice = {"index": place, "delta": delta, **_ending(wanted, [piece])}
        yield _body(wanted, answers, name, [choice])
    if wanted.with_usage:
        yield _body(wanted, answers, name, []) | {"usage": answers.usage.body()}
