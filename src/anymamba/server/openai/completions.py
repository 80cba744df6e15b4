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
from anymamba.runtime.generation import PromptScores, Sampling, TokenOutput
from anymamba.runtime.serving import Request
from anymamba.runtime.state import State
from anymamba.server.answers import Answers
from anymamba.server.errors import ApiError
from anymamba.server.fields import Fields, read_fields
from anymamba.server.openai import logprobs
from anymamba.server.openai.prompts import texts_of
from anymamba.server.openai.sampling import (
    FINISH_REASONS,
    MOST_CHOICES,
    sampling_of,
    schema_of,
    streaming_of,
    usage_body,
)
from anymamba.server.sampling import check_size, enforced, for_row
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
    writes: bool
    scores: list[PromptScores | None]

    def requests(self) -> list[Request]:
        """One for each choice, the choices of a prompt one behind the other."""
        return [
            Request(
                ids,
                for_row(self.sampling) if self.writes else None,
                self.model,
                self.client,
                self.state,
                row=row,
                scores=None if row else scores,
            )
            for ids, scores in zip(self.prompts, self.scores, strict=True)
            for row in range(self.n)
        ]

    def echoed(self, place: int) -> list[TokenOutput]:
        """The prompt of a choice, as if it were written; nothing where it is not to be echoed."""
        if not self.echo:
            return []
        ids, scores = self.prompts[place // self.n].tolist(), self.scores[place // self.n]
        if scores is None:
            return [TokenOutput(self.engine.detokenize(ids), ())]
        return logprobs.of_prompt(self.engine, ids, scores)


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
    choices = [
        _choice(wanted, place, [*wanted.echoed(place), *found])
        for place, found in enumerate(pieces)
    ]
    body = _body(wanted, answers, choices) | {"usage": usage_body(answers.usage)}
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
    top, echo = fields.integer("logprobs", 0, 20), fields.flag("echo")
    if echo and top is None:
        # Refuses where there is no tokenizer; log-probabilities need none.
        engine.detokenize([])
    # A prompt that is only to be echoed may be wanted for its log-probabilities.
    most = fields.integer("max_tokens", 0 if echo and n == 1 else 1, service.settings.most_tokens)
    writes, most = most != 0, most or 16
    sampling = sampling_of(fields, most, top)
    check_size(service.settings.most_tokens, n * len(prompts), sampling)
    schema = schema_of(fields.inner("response_format"))
    sampling = enforced(service, model, sampling, schema)
    streams, with_usage = streaming_of(fields)
    fields.only("best_of", n, "ask for n answers, and choose among them")
    fields.only("suffix", "", "the models read from left to right only")
    scores = [None if top is None or not echo else PromptScores(top) for _ in prompts]
    client = fields.text("user") or ""
    fields.done()
    return _Wanted(
        model=model,
        engine=engine,
        prompts=prompts,
        n=n,
        sampling=sampling,
        echo=echo,
        streams=streams,
        with_usage=with_usage,
        client=client,
        state=state,
        writes=writes,
        scores=scores,
    )


def _choice(
    wanted: _Wanted, place: int, pieces: Sequence[TokenOutput], offset: int = 0
) -> dict[str, Any]:
    """A choice or a part of one, whose text begins `offset` characters after the choice's."""
    has_logprobs = wanted.sampling.top_logprobs is not None
    reason = pieces[-1].finish_reason if wanted.writes else "length"
    return {
        "index": place,
        "text": "".join(piece.text for piece in pieces),
        "logprobs": logprobs.of_completion(wanted.engine, pieces, offset) if has_logprobs else None,
        "finish_reason": FINISH_REASONS[reason],
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
        pieces = [piece] if place in lengths else [*wanted.echoed(place), piece]
        choice = _choice(wanted, place, pieces, lengths.get(place, 0))
        lengths[place] = lengths.get(place, 0) + len(choice["text"])
        yield _body(wanted, answers, [choice])
    if not wanted.writes:
        for place in range(len(wanted.prompts)):
            yield _body(wanted, answers, [_choice(wanted, place, wanted.echoed(place))])
    if wanted.with_usage:
        yield _body(wanted, answers, []) | {"usage": usage_body(answers.usage)}
