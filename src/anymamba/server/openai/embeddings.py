"""`/v1/embeddings`: a vector for each text."""

from __future__ import annotations

import asyncio
import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from anymamba.runtime.generation import POOLING, Embedding, Pooling
from anymamba.runtime.serving import Request
from anymamba.server.errors import ApiError
from anymamba.server.fields import Fields, read_fields
from anymamba.server.openai.prompts import texts_of
from anymamba.server.service import Service, unless_gone

MOST_TEXTS = 2048
_FORMATS = ("float", "base64")


@dataclass(frozen=True)
class _Wanted:
    model: str
    texts: list[NDArray[np.int64]]
    pooling: str
    normalize: bool
    as_base64: bool
    client: str

    def requests(self) -> list[Request]:
        """One for each text."""
        return [
            Request(
                ids, None, self.model, self.client, pooling=Pooling(self.pooling, self.normalize)
            )
            for ids in self.texts
        ]


async def embeddings(http: HttpRequest) -> Response:
    """Answer a request."""
    service: Service = http.app.state.service
    fields = await read_fields(http, service.settings.body_bytes)
    wanted = await asyncio.to_thread(_read, fields, service)  # long texts
    vectors = await unless_gone(http, _vectors(service, wanted))
    tokens = sum(ids.size for ids in wanted.texts)
    body = {
        "object": "list",
        "data": await asyncio.to_thread(_data, vectors, wanted.as_base64),
        "model": wanted.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    return JSONResponse(body)


def _read(fields: Fields, service: Service) -> _Wanted:
    """What is wanted, with every field checked."""
    model, engine = service.engine(fields.text("model"))
    fields.require("input", "a text, its tokens, or several")
    if (given := fields.peek("input")) == "" or (isinstance(given, list) and "" in given):
        raise fields.refuse("input", "", "texts of one character or more")
    if isinstance(given, list) and [] in given:
        raise fields.refuse("input", [], "texts of one token or more")
    texts = texts_of(fields, "input", MOST_TEXTS, engine)
    most = service.settings.most_tokens
    if (tokens := sum(ids.size for ids in texts)) > most:
        message = f"the texts have {tokens} tokens together, expected at most {most}: send fewer"
        raise ApiError(400, message, "input")
    width = engine.config["hidden_size"]
    why = f"the model's vectors have {width} numbers, and do not mean the same when they are cut"
    fields.only("dimensions", width, why)
    pooling = fields.choice("pooling", POOLING, "mean") or "mean"
    normalize = fields.flag("normalize", True)
    as_base64 = fields.choice("encoding_format", _FORMATS, "float") == "base64"
    client = fields.text("user") or ""
    fields.done()
    return _Wanted(model, texts, pooling, normalize, as_base64, client)


async def _vectors(service: Service, wanted: _Wanted) -> list[NDArray[np.float32]]:
    """The vectors, of so many texts at a time as there are rows: the queue is others' too."""
    requests, vectors = wanted.requests(), []
    rows = min(service.settings.parallel, max(1, service.settings.queue // 2))
    for at in range(0, len(requests), rows):
        part = requests[at : at + rows]
        found: dict[int, NDArray[np.float32]] = {}
        async for place, event in service.events(part):
            if isinstance(event, Embedding):
                found[place] = event.vector_d
        vectors += [found[place] for place in range(len(part))]
    return vectors


def _data(vectors: list[NDArray[np.float32]], as_base64: bool) -> list[dict[str, Any]]:
    """In OpenAI's form; base64 is of little-endian float32."""
    return [
        {
            "object": "embedding",
            "index": index,
            "embedding": (
                base64.b64encode(vector_d.astype("<f4").tobytes()).decode()
                if as_base64
                else vector_d.tolist()
            ),
        }
        for index, vector_d in enumerate(vectors)
    ]
