"""A request gets the same bytes alone and in a crowd, whatever the cache, the cuts and threads."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

import anymamba
from tests.server.conftest import serving

TEXT = "Now is the winter of our discontent made glorious summer by this sun of York. " * 3
COUNT = 16


def bodies() -> list[dict[str, Any]]:
    """Requests of many kinds; some texts begin alike, so that the cache has a part of them."""
    found = []
    for i in range(COUNT):
        text = TEXT[: 5 + 13 * i] if i % 3 else TEXT[i:][:60]
        body = {"model": "m", "prompt": text, "max_tokens": 4 + i, "logprobs": 3, "seed": i}
        more: list[dict[str, Any]] = [{}, {"temperature": 0}, {"n": 2}, {"echo": True}]
        found.append(body | more[i % len(more)])
    return found


@contextmanager
def client(settings: dict[str, Any], threads: int, **limits: Any) -> Iterator[httpx.Client]:
    engine = anymamba.load(threads=threads, **settings)
    with serving(engine, **limits) as url, httpx.Client(base_url=url, timeout=60) as http:
        yield http


def choices(http: httpx.Client, body: dict[str, Any]) -> Any:
    """Texts and log-probabilities, of which JSON has every digit."""
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


def hang_up(http: httpx.Client, text: str) -> None:
    body = {"model": "m", "prompt": text, "max_tokens": 10**5, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())


@pytest.mark.parametrize("settings", [{"weights": "int8"}, {"deterministic": True}])
def test_a_crowd_changes_no_bit(settings: dict[str, Any]) -> None:
    """Beside others and some that hang up, in two threads; alone, in one, without a cache."""
    asked = bodies()
    with client(settings, 2, chunk_tokens=64) as http, ThreadPoolExecutor(COUNT + 4) as pool:
        gone = [pool.submit(hang_up, http, TEXT[i:]) for i in range(4)]
        crowd = list(pool.map(lambda body: choices(http, body), asked))
        for one in gone:
            one.result()
        again = [choices(http, body) for body in asked]  # now with the cache
    with client(settings, 1, chunk_tokens=7, cache_bytes=0) as http:
        alone = [choices(http, body) for body in asked]
    assert crowd == again == alone
