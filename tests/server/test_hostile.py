"""Whatever comes in, the server says whose mistake it was, and goes on."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from anymamba import Engine
from anymamba.runtime.chat.model_template import ChatTemplate
from anymamba.server import Settings, app
from tests.server.conftest import TEMPLATE, serving

LIMIT = 1 << 16
EXAMPLES = int(os.environ.get("ANYMAMBA_TEST_REQUESTS", "300"))
JSON = {"content-type": "application/json"}
HEAD = "POST /v1/completions HTTP/1.1\r\nhost: localhost:80\r\ncontent-type: application/json\r\n"


def names(text: str) -> list[str]:
    return text.split()


FIELDS = {
    "/v1/completions": names(
        "model prompt state n max_tokens logprobs echo stream stream_options best_of suffix user "
        "temperature top_p top_k min_p typical_p presence_penalty frequency_penalty "
        "repetition_penalty seed logit_bias stop wings"
    ),
    "/v1/chat/completions": names(
        "model messages n max_tokens max_completion_tokens logprobs top_logprobs stream "
        "stream_options modalities store user temperature seed stop logit_bias tools tool_choice "
        "parallel_tool_calls response_format safety_identifier wings"
    ),
    "/v1/responses": names(
        "model input instructions previous_response_id store stream stream_options include "
        "max_output_tokens top_logprobs temperature top_p text tools tool_choice metadata "
        "parallel_tool_calls background truncation service_tier prompt_cache_key user wings"
    ),
    "/v1/messages": names(
        "model messages system max_tokens stop_sequences temperature top_p top_k stream tools "
        "tool_choice metadata thinking output_config service_tier cache_control wings"
    ),
    "/v1/messages/count_tokens": names(
        "model messages system tools tool_choice thinking output_config cache_control wings"
    ),
    "/v1/states": names("model input state wings"),
    "/v1/embeddings": names("model input encoding_format dimensions pooling normalize user wings"),
    "/tokenize": names("model prompt add_special_tokens wings"),
    "/detokenize": names("model tokens wings"),
}
HELLO = {"role": "user", "content": "a"}
SOUND: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [HELLO], "max_tokens": 1},
    "/v1/responses": {"input": "a", "max_output_tokens": 1},
    "/v1/messages": {"messages": [HELLO], "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": [HELLO]},
    "/v1/states": {"input": "a"},
    "/v1/embeddings": {"input": "a"},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1]},
}


@pytest.fixture(scope="module")
def client(engine: Engine) -> Any:
    limits = Settings(body_bytes=LIMIT, most_tokens=64, state_bytes=1 << 22, shutdown_seconds=0)
    templates = {"m": ChatTemplate(TEMPLATE, {})}
    with TestClient(app({"m": engine}, templates, limits), raise_server_exceptions=False) as made:
        yield made


NAMES = st.text(max_size=5) | st.sampled_from(["\ud800", "a\udfff"])
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 3)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["a", "m", 10**400, -1e308, "\ud800", {"role": "user", "content": 1}]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=2),
    max_leaves=5,
)
# Objects that are nearly what is expected: with any values under the names that are known.
NEAR = st.recursive(
    VALUES | st.sampled_from(names("function object string text tool auto message json_schema f")),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                names(
                    "type role content text name id function arguments parameters input "
                    "input_schema tool_calls tool_call_id tool_use_id call_id output "
                    "json_schema schema format strict description properties is_error "
                    "citations cache_control"
                )
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=8,
)
BODIES = st.sampled_from(list(FIELDS)).flatmap(
    lambda path: st.tuples(
        st.just(path),
        st.dictionaries(st.sampled_from(FIELDS[path]) | NAMES, VALUES | NEAR, max_size=4),
    )
)


@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow])
@given(request=BODIES)
def test_fields_of_any_type_and_size(
    client: TestClient, request: tuple[str, dict[str, Any]]
) -> None:
    path, fields = request
    data = json.dumps({"model": "m", **SOUND[path], **fields}).encode()
    answer = client.post(path, content=data, headers=JSON)
    assert answer.status_code in (200, 201, 400, 404, 507), answer.text
    if answer.status_code >= 400:
        assert answer.json()["error"]["message"]
    health = client.get("/health").json()
    assert (health["running"], health["waiting"]) == (0, 0)


@pytest.mark.parametrize(
    ("data", "status", "message"),
    [
        (b"", 400, "not valid JSON"),
        (b"{", 400, "not valid JSON"),
        (b"[]", 400, "expected a JSON object"),
        (b"\xff\xfe", 400, "not valid JSON"),
        (b'{"a":' * 30_000, 413, "larger than"),
        (b'{"a":' * 12_000, 400, "not valid JSON"),
        (b'{"n": NaN, "prompt": "a"}', 400, "NaN is not a number in JSON"),
        (b'{"n": ' + b"9" * 10_000 + b"}", 400, "not valid JSON"),
        (b"[" * 60_000 + b"]" * 5_000, 400, "not valid JSON"),
        (b'{"prompt": "' + b"a" * LIMIT + b'"}', 413, "larger than"),
        (b'{"prompt": "a", "model": "' + b"a" * 60_000 + b'"}', 404, "is not served here"),
    ],
)
def test_bodies(client: TestClient, data: bytes, status: int, message: str) -> None:
    answer = client.post("/v1/completions", content=data, headers=JSON)
    assert (answer.status_code, message in answer.json()["error"]["message"]) == (status, True)
    assert len(answer.content) < 2_000


@pytest.mark.parametrize(
    "path", ["/nothing", "/page/nothing", "/v1/nothing", "/v1/models/x", "/v1/states/none"]
)
def test_other_paths(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "not_found_error"
    assert client.put("/v1/completions").status_code == 405


def test_a_client_that_hangs_up_frees_its_row(engine: Engine) -> None:
    """Not streaming, streaming, and while its prompt is read."""
    bodies: list[dict[str, Any]] = [
        {"prompt": "a", "max_tokens": 10**6},
        {"prompt": "a", "max_tokens": 10**6, "stream": True},
        {"prompt": "a" * 300_000, "max_tokens": 1},
        {"messages": [HELLO], "max_tokens": 10**6, "stream": True},
        {"input": "a", "max_output_tokens": 10**6, "stream": True},
        {"messages": [HELLO], "max_tokens": 10**6, "stream": True, "stop_sequences": ["\0"]},
    ]
    paths = ["completions"] * 3 + ["chat/completions", "responses", "messages"]
    with serving(engine, parallel=1) as address:
        for path, body in zip(paths, bodies, strict=True):
            place = urlsplit(address)
            data = json.dumps(body).encode()
            with socket.create_connection((place.hostname, place.port)) as sent:
                start = HEAD.replace("/v1/completions", f"/v1/{path}")
                head = f"{start}content-length: {len(data)}\r\n\r\n"
                sent.sendall(head.encode() + data)
                wait_for(address, running=1)
            wait_for(address, running=0)
        with httpx.Client(base_url=address) as http:  # the next one is served
            assert http.post("/v1/completions", json={"prompt": "a"}).status_code == 200


def wait_for(address: str, **expected: int) -> None:
    deadline = time.monotonic() + 10
    while True:
        found = httpx.get(f"{address}/health").json()
        if {name: found[name] for name in expected} == expected:
            return
        assert time.monotonic() < deadline, found
        time.sleep(0.01)


def test_half_a_request_holds_up_nobody(engine: Engine) -> None:
    with serving(engine, parallel=1) as address:
        place = urlsplit(address)
        head = f"{HEAD}content-length: 1000\r\n\r\n{{".encode()
        slow = [socket.create_connection((place.hostname, place.port)) for _ in range(20)]
        for connection in slow:
            connection.sendall(head)
        assert httpx.post(f"{address}/v1/completions", json={"prompt": "a"}).status_code == 200
        for connection in slow:
            connection.close()
        wait_for(address, running=0, waiting=0)


def test_a_full_queue_is_said(engine: Engine) -> None:
    body = {"prompt": "a", "max_tokens": 10**6, "stream": True}
    with serving(engine, parallel=1, queue=1) as address, httpx.Client(base_url=address) as http:
        with http.stream("POST", "/v1/completions", json=body):
            waiting = threading.Thread(
                target=http.post, args=("/v1/completions",), kwargs={"json": {"prompt": "a"}}
            )
            waiting.start()
            wait_for(address, waiting=1)
            refused = http.post("/v1/completions", json={"prompt": "a"})
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "1"
        waiting.join()


def test_two_users_never_share_a_state(engine: Engine) -> None:
    """A thousand requests at a time, each with its own answer; some are cancelled or malformed."""
    prompts = [
        f"{name}: {number} " for number in range(40) for name in ("ROMEO", "JULIET", "NURSE")
    ]
    expected = {prompt: engine.generate(prompt, max_new_tokens=4).text for prompt in prompts}
    wrong: list[str] = []

    def run(http: httpx.Client, part: list[str]) -> None:
        for number, prompt in enumerate(part):
            body = {"prompt": prompt, "max_tokens": 4, "temperature": 0, "stream": number % 7 == 3}
            if number % 7 == 5:
                assert http.post("/v1/completions", json=body | {"n": "x"}).status_code == 400
            with http.stream("POST", "/v1/completions", json=body) as answer:
                if body["stream"]:
                    continue  # hang up
                found = json.loads(answer.read())["choices"][0]["text"]
            if found != expected[prompt]:
                wrong.append(prompt)

    with serving(engine, parallel=8) as address, httpx.Client(base_url=address, timeout=60) as http:
        threads = [threading.Thread(target=run, args=(http, prompts[i::12])) for i in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_for(address, running=0, waiting=0)
    assert wrong == []
