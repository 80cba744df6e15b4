"""What Prometheus reads is what happened."""

from __future__ import annotations

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from anymamba import Engine
from anymamba.server import Settings, app


def samples(text: str) -> dict[tuple[str, str], float]:
    """Every number of model "m", by its name and its finish reason or bound."""
    return {
        (sample.name, sample.labels.get("finished_reason") or sample.labels.get("le", "")): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("model_name", "m") == "m"
    }


def test_what_is_counted_is_what_happened(engine: Engine) -> None:
    with TestClient(app({"m": engine, "n": engine}, {}, Settings(shutdown_seconds=0))) as client:
        body = {"model": "m", "prompt": "ROMEO:", "max_tokens": 5, "temperature": 0}
        written = sum(
            client.post("/v1/completions", json=body | more).json()["usage"]["completion_tokens"]
            for more in ({}, {"stop": "w"}, {"n": 2})
        )
        assert client.post("/v1/completions", json=body | {"prompt": [9999]}).status_code == 400
        answer = client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=")
        found = samples(answer.text)
    assert found["vllm:generation_tokens_total", ""] == written == 5 + 4 + 10
    assert found["vllm:prompt_tokens_total", ""] == 4 * 6
    assert found["vllm:prefix_cache_queries_total", ""] == 4 * 6
    assert found["vllm:prefix_cache_hits_total", ""] == 3 * 6
    finished = {key[1]: value for key, value in found.items() if "request_success" in key[0]}
    assert finished == {"stop": 1, "length": 3, "abort": 0, "error": 0}
    assert found["vllm:time_to_first_token_seconds_count", ""] == 4
    assert found["vllm:inter_token_latency_seconds_count", ""] == written - 4
    assert found["vllm:e2e_request_latency_seconds_count", ""] == 4
    assert found["vllm:request_prompt_tokens_bucket", "5.0"] == 0
    assert found["vllm:request_prompt_tokens_bucket", "10.0"] == 4
    assert found["vllm:request_generation_tokens_sum", ""] == written
    assert found["vllm:e2e_request_latency_seconds_sum", ""] > 0
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert found[f"vllm:{name}", ""] == 0
    assert found["anymamba:prefix_cache_bytes", ""] > 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "ROMEO:", "echo": True, "logprobs": 0, "max_tokens": 1}),
        ("/v1/embeddings", {"input": "ROMEO:"}),
    ],
)
def test_what_is_read_as_a_whole_does_not_ask_the_cache(
    engine: Engine, path: str, body: dict[str, object]
) -> None:
    with TestClient(app({"m": engine}, {}, Settings(shutdown_seconds=0))) as client:
        assert client.post(path, json=body).status_code == 200
        found = samples(client.get("/metrics").text)
    assert found["vllm:prompt_tokens_total", ""] == 6
    assert found["vllm:prefix_cache_queries_total", ""] == 0


def test_an_answer_that_is_given_up_counts_once_as_aborted(engine: Engine, address: str) -> None:
    url = f"{address}/v1/completions"
    body = {"model": "m", "prompt": "a", "max_tokens": 10**6, "stream": True}
    before = samples(httpx.get(f"{address}/metrics").text)
    with httpx.stream("POST", url, json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        running = samples(httpx.get(f"{address}/metrics").text)
    assert running["vllm:num_requests_running", ""] == 1
    assert running["vllm:kv_cache_usage_perc", ""] == 0.25
    name = "vllm:request_success_total"
    for _ in range(100):
        after = samples(httpx.get(f"{address}/metrics").text)
        if after[name, "abort"] > before[name, "abort"]:
            break
    assert after[name, "abort"] == before[name, "abort"] + 1
    assert after[name, "length"] == before[name, "length"]


@pytest.mark.parametrize(("given", "status"), [("Bearer sesame", 200), ("Bearer x", 401)])
def test_metrics_need_the_key(engine: Engine, given: str, status: int) -> None:
    with TestClient(app(engine, settings=Settings(api_key="sesame"))) as client:
        assert client.get("/metrics", headers={"authorization": given}).status_code == status
