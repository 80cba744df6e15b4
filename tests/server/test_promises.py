"""What a server of a recurrent model must never get wrong, through HTTP, each by its name."""

from __future__ import annotations

import hmac
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.testclient import TestClient

import anymamba
from anymamba import Engine
from anymamba.runtime.serving import PrefixCache
from anymamba.server import Settings, app
from tests.server.conftest import serving

TEXT = "Now is the winter of our discontent made glorious summer by this sun of York. "
CHUNK = 16


def completed(client: Any, text: str, **fields: Any) -> httpx.Response:
    body = {"model": "m", "prompt": text, "max_tokens": 8, "temperature": 0, **fields}
    answer: httpx.Response = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer


def cached_tokens(answer: httpx.Response) -> int:
    found: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


def text_of(answer: httpx.Response) -> str:
    text: str = answer.json()["choices"][0]["text"]
    return text


@pytest.fixture
def client(engine: Engine) -> Iterator[TestClient]:
    limits = Settings(parallel=4, chunk_tokens=CHUNK, shutdown_seconds=0)
    with TestClient(app({"m": engine}, {}, limits)) as made:
        yield made


def test_a_restored_state_is_used_and_equals_recomputing(engine: Engine, tmp_path: Path) -> None:
    """After a restart, and nothing of it is computed again: the core reads the new tokens only."""
    limits = Settings(cache_dir=tmp_path, shutdown_seconds=0)
    with TestClient(app({"m": engine}, {}, limits)) as before:
        completed(before, TEXT)
    more = TEXT + "And all the clouds"
    read = []
    advance = engine._network.advance

    def counted(blocks: Any, rows: Any, sequences: Any) -> None:
        read.append(sum(ids.size for ids in sequences))
        advance(blocks, rows, sequences)

    engine._network.advance = counted  # type: ignore[method-assign]
    try:
        with TestClient(app({"m": engine}, {}, limits)) as after:
            answer = completed(after, more, max_tokens=1)
    finally:
        del engine._network.advance  # type: ignore[method-assign]
    assert cached_tokens(answer) == len(TEXT)
    assert sum(read) == len(more) - len(TEXT)
    assert text_of(answer) == engine.generate(more, 1).text


def test_a_state_is_never_cut_backwards_silently(client: TestClient, engine: Engine) -> None:
    """A text that ends, or turns away, inside one that was read is read anew, and that is said."""
    completed(client, TEXT)
    for shorter in (TEXT[:40], TEXT[:20] + "!"):
        answer = completed(client, shorter)
        assert cached_tokens(answer) == 0
        assert answer.headers["x-anymamba-cache-miss"] == "no such prefix"
        assert text_of(answer) == engine.generate(shorter, 8).text


def test_batch_equals_alone(engine: Engine) -> None:
    texts = [TEXT[i : 20 + 3 * i] for i in range(16)]
    with (
        serving(engine, parallel=16) as url,
        httpx.Client(base_url=url, timeout=30) as http,
        ThreadPoolExecutor(16) as pool,
    ):
        answers = list(pool.map(lambda text: completed(http, text, max_tokens=20), texts))
    assert [text_of(answer) for answer in answers] == [
        engine.generate(text, 20).text for text in texts
    ]


def test_the_same_over_chunking_and_cache_hits(engine: Engine) -> None:
    expected = engine.generate(TEXT, 8).text
    for chunk_tokens in (1, 7, 64, 4096):
        limits = Settings(chunk_tokens=chunk_tokens, shutdown_seconds=0)
        with TestClient(app({"m": engine}, {}, limits)) as client:
            cuts = [completed(client, TEXT[:length]) for length in (1, 30, len(TEXT))]
            assert [cached_tokens(answer) for answer in cuts] == [0, 1, 30]
            again = completed(client, TEXT)
        assert text_of(cuts[-1]) == text_of(again) == expected


def test_the_cached_state_is_the_one_after_exactly_these_tokens(
    client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[int, Any] = {}
    keep = PrefixCache.keep

    def noted(self: PrefixCache, model: str, key: Any, state: Any) -> None:
        kept[key[0]] = state
        keep(self, model, key, state)

    monkeypatch.setattr(PrefixCache, "keep", noted)
    answer = completed(client, TEXT[:40])
    whole = engine.tokenize(TEXT[:40] + text_of(answer))
    assert sorted(kept) == [40, 47]  # the prompt; and the answer without its last token
    for count, state in kept.items():
        expected = engine.prefill(engine.state(), whole[:count])
        mine, theirs = (found.batch_of(engine.identity) for found in (state, expected))
        # Read token by token in the one, in chunks in the other.
        assert np.allclose(mine.ssm, theirs.ssm, atol=1e-4 * abs(theirs.ssm).max())
        assert np.allclose(mine.conv, theirs.conv, atol=1e-4 * abs(theirs.conv).max())


def test_a_hit_rate_of_0_says_why(engine: Engine) -> None:
    limits = Settings(cache_bytes=400_000, shutdown_seconds=0)  # two states
    with TestClient(app({"m": engine, "n": engine}, {}, limits)) as client:
        for text, fields, miss in (
            (TEXT, {}, "no such prefix"),
            (TEXT, {"model": "n"}, "other model"),
            ("Brutus", {}, "no such prefix"),
            (TEXT, {}, "evicted"),
        ):
            answer = completed(client, text, max_tokens=1, **fields)
            assert (cached_tokens(answer), answer.headers["x-anymamba-cache-miss"]) == (0, miss)


def test_a_hit_of_100_percent_works(client: TestClient) -> None:
    first, second, third = (completed(client, TEXT) for _ in range(3))
    assert [cached_tokens(answer) for answer in (first, second, third)] == [0, *[len(TEXT)] * 2]
    assert text_of(first) == text_of(second) == text_of(third)
    assert "x-anymamba-cache-miss" not in second.headers


@pytest.mark.parametrize("tail", [0, 1, CHUNK])
def test_tails_of_length_0_and_1_and_a_whole_chunk(
    client: TestClient, engine: Engine, tail: int
) -> None:
    completed(client, TEXT[:CHUNK])
    answer = completed(client, TEXT[: CHUNK + tail])
    assert cached_tokens(answer) == CHUNK
    assert text_of(answer) == engine.generate(TEXT[: CHUNK + tail], 8).text


def test_what_is_evicted_and_read_again_counts_once(engine: Engine) -> None:
    """In `usage` and in what Prometheus reads."""
    with TestClient(app({"m": engine}, {}, Settings(cache_bytes=0, shutdown_seconds=0))) as client:
        usages = [completed(client, TEXT).json()["usage"] for _ in range(3)]
        metrics = client.get("/metrics").text
    for usage in usages:
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(TEXT), 8)
        assert usage["total_tokens"] == len(TEXT) + 8
        assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
    assert f'vllm:prompt_tokens_total{{model_name="m"}} {3 * len(TEXT)}.0' in metrics
    assert 'vllm:prefix_cache_hits_total{model_name="m"} 0.0' in metrics


def test_the_cache_of_another_quantization_is_not_used(engine: Engine, tmp_path: Path) -> None:
    for weights in ("bf16", "int8", "bf16"):
        limits = Settings(cache_dir=tmp_path, shutdown_seconds=0)
        quantized = anymamba.load(weights=weights)
        with TestClient(app({"m": quantized}, {}, limits)) as client:
            answer = completed(client, TEXT, max_tokens=1)
        found = len(list(tmp_path.glob("*.safetensors")))
        assert found == 1 + (weights == "int8" or cached_tokens(answer) > 0)
    assert cached_tokens(answer) == len(TEXT)


def test_the_second_request_after_the_first_works(engine: Engine) -> None:
    """On the same connection, after an answer, an error, a stream, and one that was left early."""
    with serving(engine, parallel=1) as url, httpx.Client(base_url=url, timeout=30) as http:
        expected = text_of(completed(http, TEXT))
        assert http.post("/v1/completions", json={"prompt": 5}).status_code == 400
        body = {"prompt": TEXT, "max_tokens": 8, "stream": True}
        assert http.post("/v1/completions", json=body).text.endswith("data: [DONE]\n\n")
        with http.stream("POST", "/v1/completions", json=body | {"max_tokens": 10**5}) as answer:
            for _ in zip(range(3), answer.iter_lines(), strict=False):
                pass
        assert text_of(completed(http, TEXT)) == expected


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "(a{1,900}){1,900}{1,900}"},
        {"type": "array", "items": {"type": "string"}, "minItems": 10**9},
        {"allOf": [{"anyOf": [{"const": i} for i in range(200)]}] * 200},
        {"$ref": "#"},
    ],
)
def test_schema_bombs_are_refused_in_bounded_time(
    client: TestClient, schema: dict[str, Any]
) -> None:
    """Or enforced; and others are served meanwhile."""
    form = {"type": "json_schema", "json_schema": {"name": "bomb", "schema": schema}}
    body = {"model": "m", "prompt": "a", "max_tokens": 2, "response_format": form}
    took: list[float] = []
    done = threading.Event()

    def beside() -> None:
        while not done.is_set():
            start = time.monotonic()
            assert client.get("/health").status_code == 200
            took.append(time.monotonic() - start)

    others = threading.Thread(target=beside)
    others.start()
    try:
        start = time.monotonic()
        answer = client.post("/v1/completions", json=body)
        assert time.monotonic() - start < 20
    finally:
        done.set()
        others.join()
    assert answer.status_code in (200, 400)
    if answer.status_code == 400:
        assert answer.json()["error"]["param"].startswith("response_format")
    assert max(took) < 5


def test_a_wrong_key_gets_401_in_constant_time(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is compared whole, by the function made for that, however it looks."""
    compared: list[bytes] = []

    def noted(given: bytes, key: bytes) -> bool:
        compared.append(given)
        return genuine(given, key)

    genuine = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", noted)
    with TestClient(app(engine, settings=Settings(api_key="sesame"))) as client:
        for given in ("sesamE", "s", "", "x" * 5000, "sesame2"):
            answer = client.get("/v1/models", headers={"authorization": f"Bearer {given}"})
            assert answer.status_code == 401
            assert json.loads(answer.text)["error"]["code"] == "invalid_api_key"
        assert client.get("/v1/models").status_code == 401
    assert len(compared) == 12  # what the header authorization has, and x-api-key
