"""`/v1/completions`: continue texts, or their tokens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from anymamba.runtime.engine import Engine
from anymamba.runtime.generation import Sampling, TokenOutput
from anymamba.runtime.serving import Request
from anymamba.runtime.state import State
from anymamba.server.errors import ApiError
from anymamba.server.fields import Fields, read_fields
from anymamba.server.openai import logprobs
from anymamba.server.openai.answers import FINISH_REASONS, Answers
from anymamba.server.openai.prompts import texts_of
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


@dataclass(frozen=True)
class _Wanted:
    model: str
    engine: Engine
    prompts: list[NDArray[np.int64]]
    n: int
    sampling: Sampling
    echo: bool
    streams: bool
    with_usage: bool
    client: str
    state: State | None

    def requests(self) -> list[Request]:
        """One for each choice, the choices of a prompt one behind the other."""
        return [
            Request(ids, for_row(self.sampling), self.model, self.client, self.state, row=row)
            for ids in self.prompts
            for row in range(self.n)
        ]


async def completions(http: HttpRequest) -> Response:
    """Answer a request."""
    service: Service = http.app.state.service
    fields = await read_fields(http, service.settings.body_bytes)
    wanted = await asyncio.to_thread(_read, fields, service)  # long texts, large schemas
    read_before = 0 if wanted.state is None else wanted.state.token_count
    answers = Answers(service, wanted.requests(), read_before)
    headers = await unless_gone(http, answers.start())
    if wanted.streams:
        return stream(_chunks(wanted, answers), headers)
    pieces = await unless_gone(http, answers.collect())
    choices = [_choice(wanted, place, found) for place, found in enumerate(pieces)]
    body = _body(wanted, answers, choices) | {"usage": answers.usage.body()}
    return JSONResponse(body, headers=headers)


def _read(fields: Fields, service: Service) -> _Wanted:
    """What is wanted, with every field checked."""
    model, engine = service.engine(fields.text("model"))
    state = service.state_of(fields.text("state"), model)
    fields.require("prompt", "a text, its tokens, or several")
    prompts = texts_of(fields, "prompt", MOST_CHOICES, engine, state)
    n = fields.integer("n", 1, MOST_CHOICES, 1) or 1
    if n * len(prompts) > MOST_CHOICES:
        raise ApiError(
            400, f"n times the prompts is {n * len(prompts)}, expected at most {MOST_CHOICES}", "n"
        )
    top = fields.integer("logprobs", 0, 20)
    most = fields.integer("max_tokens", 1, service.settings.most_tokens, 16) or 16
    sampling = sampling_of(fields, most, top)
    check_size(service.settings.most_tokens, n * len(prompts), sampling)
    if (form := fields.inner("response_format")) is not None:
        sampling = constrained(sampling, form, service.grammars(model))
    echo, (streams, with_usage) = fields.flag("echo"), streaming_of(fields)
    fields.only("best_of", n, "ask for n answers, and choose among them")
    fields.only("suffix", "", "the models read from left to right only")
    if echo and top is not None:
        raise ApiError(
            400, "echo with logprobs is not supported: ask for one of them", "echo", "unsupported"
        )
    client = fields.text("user") or ""
    fields.done()
    return _Wanted(model, engine, prompts, n, sampling, echo, streams, with_usage, client, state)


def _choice(wanted: _Wanted, place: int, pieces: Sequence[TokenOutput]) -> dict[str, Any]:
    text = "".join(piece.text for piece in pieces)
    if wanted.echo:
        text = wanted.engine.detokenize(wanted.prompts[place // wanted.n].tolist()) + text
    return _part(wanted, place, pieces, text)


def _part(
    wanted: _Wanted, place: int, pieces: Sequence[TokenOutput], text: str, offset: int = 0
) -> dict[str, Any]:
    has_logprobs = wanted.sampling.top_logprobs is not None
    return {
        "index": place,
        "text": text,
        "logprobs": logprobs.of_completion(wanted.engine, pieces, offset) if has_logprobs else None,
        "finish_reason": FINISH_REASONS[pieces[-1].finish_reason],
    }


def _body(wanted: _Wanted, answers: Answers, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": f"cmpl-{answers.id}",
        "object": "text_completion",
        "created": answers.created,
        "model": wanted.model,
        "choices": choices,
    }


async def _chunks(wanted: _Wanted, answers: Answers) -> AsyncIterator[dict[str, Any]]:
    lengths: dict[int, int] = {}  # of the text of each choice so far
    async for place, piece in answers.tokens():
        beginning = ""
        if wanted.echo and place not in lengths:
            beginning = wanted.engine.detokenize(wanted.prompts[place // wanted.n].tolist())
        text, offset = beginning + piece.text, lengths.get(place, 0)
        lengths[place] = offset + len(text)
        yield _body(wanted, answers, [_part(wanted, place, [piece], text, offset)])
    if wanted.with_usage:
        yield _body(wanted, answers, []) | {"usage": answers.usage.body()}
