"""Vectors of texts through OpenAI's own client, beside what else goes on."""

from __future__ import annotations

import base64
import json
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import openai
import pytest

from anymamba import Engine
from anymamba.server.openai import embeddings
from tests.server.conftest import serving


@pytest.fixture(scope="module")
def client(address: str) -> Any:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def vectors(answer: Any) -> np.ndarray:
    assert [item.index for item in answer.data] == list(range(len(answer.data)))
    return np.array([item.embedding for item in answer.data], np.float32)


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_vectors_are_the_engine_s(client: Any, engine: Engine, encoding: str) -> None:
    texts = ["a rose", "a lily", "x" * 600]
    answer = client.embeddings.create(model="m", input=texts, encoding_format=encoding)
    found = answer.data[0].embedding
    if encoding == "base64":
        assert np.frombuffer(base64.b64decode(found), "<f4").shape == (256,)
    else:
        assert np.allclose(vectors(answer), engine.embed(texts), atol=1e-5)
        assert np.allclose(np.linalg.norm(vectors(answer), axis=1), 1, atol=1e-5)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == 612
    # By default the client asks for base64, and reads it.
    one = vectors(client.embeddings.create(model="m", input="a rose"))
    assert np.allclose(one[0], engine.embed(["a rose"])[0], atol=1e-5)


def test_inputs_and_pooling(client: Any, engine: Engine) -> None:
    ids = engine.tokenize("a rose")
    last = {"pooling": "last", "normalize": False}
    expected = engine.embed([ids], "last", normalize=False)
    for given in (ids, [ids], ["a rose"]):
        answer = client.embeddings.create(model="m", input=given, dimensions=256, extra_body=last)
        assert np.allclose(vectors(answer), expected, atol=1e-4)


def test_more_texts_than_rows(client: Any, engine: Engine) -> None:
    texts = [f"text {i}" for i in range(70)]  # the queue has room for 64
    answer = client.embeddings.create(model="m", input=texts, user="a")
    assert np.allclose(vectors(answer), engine.embed(texts), atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input": ""}, "input is ''"),
        ({"input": ["a", ""]}, "input is ''"),
        ({"input": []}, "up to 2048"),
        ({"input": [[]]}, "one token or more"),
        ({"input": [256]}, "vocabulary"),
        ({"input": ["a"] * 2049}, "up to 2048"),
        ({"input": "a", "dimensions": 8}, "dimensions is 8, which is not supported"),
        ({"input": "a", "dimensions": 0}, "dimensions is 0"),
        ({"input": "a", "encoding_format": "hex"}, "'float' or 'base64'"),
        ({"input": "a", "pooling": "max"}, "'mean' or 'last'"),
        ({"input": "a", "model": "x"}, "is not served here"),
    ],
)
def test_wrong_fields_are_named(address: str, fields: dict[str, Any], message: str) -> None:
    answer = httpx.post(f"{address}/v1/embeddings", json={"model": "m", **fields})
    assert answer.status_code in (400, 404)
    assert message in answer.json()["error"]["message"]


def test_a_client_that_hangs_up_frees_its_rows(engine: Engine) -> None:
    data = json.dumps({"model": "m", "input": ["a" * 200_000] * 4}).encode()
    head = f"POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(data)}\r\n"
    with serving(engine, parallel=2) as url:
        with socket.create_connection(urlsplit(url).netloc.split(":")) as asking:
            asking.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + data)
            wait_for(url, running=2, waiting=0)
        wait_for(url, running=0, waiting=0)


def wait_for(url: str, **expected: int) -> None:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        health = httpx.get(f"{url}/health").json()
        if {name: health[name] for name in expected} == expected:
            return
        time.sleep(0.01)
    raise AssertionError(health)


def test_so_many_tokens_at_most(engine: Engine) -> None:
    assert embeddings.MOST_TEXTS == 2048
    with serving(engine, most_tokens=10) as url:
        answer = httpx.post(f"{url}/v1/embeddings", json={"input": ["a" * 6] * 2})
        assert (answer.status_code, "12 tokens" in answer.text) == (400, True)
