"""Who is let in, how much one client may ask for, and what happens at the end."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.testclient import TestClient

from anymamba import Engine, Sampling
from anymamba.errors import InputError
from anymamba.runtime.generation import TokenOutput
from anymamba.runtime.serving import Request, Scheduler
from anymamba.server import Settings, app, listening
from anymamba.server.errors import ApiError
from anymamba.server.openai import logprobs
from anymamba.server.service import Service
from anymamba.server.stored_states import StoredStates

FILE = {"content-type": "application/octet-stream"}


def client_of(engine: Engine, base_url: str = "http://testserver", **settings: Any) -> TestClient:
    limits = Settings(shutdown_seconds=0, **settings)
    return TestClient(app({"m": engine}, {}, limits), base_url, raise_server_exceptions=False)


def test_keys_and_headers(engine: Engine) -> None:
    with client_of(engine, api_key="sesame") as client:
        for given, status in (
            ("Bearer sesame", 200),
            ("bearer sesame", 200),
            ("sesame", 401),
            ("Basic sesame", 401),
            ("Bearer sesam", 401),
        ):
            answer = client.get("/v1/models", headers={"authorization": given})
            assert answer.status_code == status, given
        assert answer.headers["www-authenticate"] == "Bearer"
        answer = client.put("/v1/models", headers={"authorization": "Bearer sesame"})
        assert (answer.status_code, "GET" in answer.headers["allow"]) == (405, True)


def test_a_page_of_another_site_is_not_let_in(engine: Engine) -> None:
    """Neither by a body that browsers send unasked, nor by its own name for this machine."""
    body = {"prompt": "a", "max_tokens": 1}
    with client_of(engine, "http://127.0.0.1") as client:
        for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
            headers = {"content-type": kind}
            for path in ("/v1/completions", "/v1/states/file"):
                answer = client.post(path, content=json.dumps(body), headers=headers)
                assert answer.status_code == 415
        for host, status in (
            ("localhost:8000", 200),
            ("127.0.0.1", 200),
            ("[::1]:80", 200),
            ("evil.org", 403),
            ("127.0.0.1.evil.org", 403),
        ):
            answer = client.post("/v1/completions", json=body, headers={"host": host})
            assert answer.status_code == status, host
    with client_of(engine, "http://127.0.0.1", api_key="a") as client:  # a proxy's, with a key
        headers = {"host": "bard.org", "authorization": "Bearer a"}
        assert client.get("/v1/models", headers=headers).status_code == 200


def test_a_fault_has_the_form_of_other_errors(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*_: object) -> Any:
        raise RuntimeError("secret")

    monkeypatch.setattr(StoredStates, "get", fault)
    with client_of(engine) as client:
        answer = client.get("/v1/states/a")
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "secret" not in answer.text


def test_half_a_character_is_refused_by_name(engine: Engine) -> None:
    data = b'{"prompt": "a", "\\ud800": 1}'
    with client_of(engine) as client:
        answer = client.post(
            "/v1/completions", content=data, headers={"content-type": "application/json"}
        )
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "\\ud800")


def test_a_client_that_goes_while_it_sends_is_no_fault(engine: Engine) -> None:
    """What is raised out of the application is a fault, which the log has with its traceback."""
    parts = iter([{"type": "http.request", "body": b"{", "more_body": True}])

    async def receive() -> Any:
        return next(parts, {"type": "http.disconnect"})

    async def send(_: Any) -> None:
        pass

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
    scope |= {"query_string": b"", "root_path": "", "server": ("testserver", 80)}
    asyncio.run(app({"m": engine})(scope, receive, send))


def test_health_tells_of_a_thread_that_died(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*_: object) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr("threading.excepthook", lambda _: None)
    with client_of(engine) as client:
        assert client.get("/health").status_code == 200
        monkeypatch.setattr(Scheduler, "_admit", fault)
        answer = client.post("/v1/completions", json={"prompt": "a"})
        assert (answer.status_code, "has failed" in answer.text) == (503, True)
        assert client.get("/health").status_code == 503


def test_slow_work_is_not_done_in_the_event_loop(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []

    def noted(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            threads.append(threading.current_thread().name)
            return function(*args, **options)

        return call

    for name in ("prompt_ids", "tokenize", "detokenize", "load_state"):
        monkeypatch.setattr(engine, name, noted(getattr(engine, name)))
    monkeypatch.setattr(Scheduler, "submit", noted(Scheduler.submit))
    with client_of(engine) as client:
        client.post("/tokenize", json={"prompt": "a"})
        client.post("/detokenize", json={"tokens": [1]})
        state = client.post("/v1/states", json={"input": "a"}).json()["id"]
        file = client.get(f"/v1/states/{state}/file").content
        assert client.post("/v1/states/file", content=file, headers=FILE).status_code == 201
        client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
    assert len(threads) >= 7
    assert all(name.startswith(("asyncio_", "scheduler")) for name in threads), threads


def test_a_state_is_not_read_or_sent_where_there_is_no_room(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = engine.prefill(engine.state(), "a").nbytes
    with client_of(engine, state_bytes=2 * size) as client:
        answer = client.post("/v1/states/file", content=b"a" * (size + 70_000), headers=FILE)
        assert answer.status_code == 413
        for _ in range(2):
            assert client.post("/v1/states", json={"input": "a"}).status_code == 201
        monkeypatch.setattr(Scheduler, "submit", None)  # nothing is computed for it
        assert client.post("/v1/states", json={"input": "a"}).status_code == 507
        assert client.post("/v1/states/file", content=b"", headers=FILE).status_code == 507


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"max_tokens": 32}, 200),
        ({"max_tokens": 16, "n": 2}, 200),
        ({"max_tokens": 16, "n": 3}, 400),
        ({"max_tokens": 16, "logprobs": 1}, 200),
        ({"max_tokens": 16, "logprobs": 2}, 400),
        ({"prompt": "a" * 41, "max_tokens": 1}, 400),
    ],
)
def test_a_request_asks_for_so_much_at_most(
    engine: Engine, fields: dict[str, Any], status: int
) -> None:
    with client_of(engine, most_tokens=32, prompt_tokens=40) as client:
        answer = client.post("/v1/completions", json={"prompt": "a", **fields})
    assert answer.status_code == status, answer.text


def test_a_slow_reader_is_given_up(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anymamba.server.service._MOST_UNREAD", 20)
    service = Service({"m": engine}, {}, Settings(shutdown_seconds=0))

    async def read_slowly() -> int:
        request = Request(np.array([65]), Sampling(max_new_tokens=10**6), "m")
        events = service.events([request])
        await anext(events)
        while service.scheduler.running:
            await asyncio.sleep(0.01)
        return await count_all(events)

    async def count_all(events: Any) -> int:
        count = 0
        try:
            async for _ in events:
                count += 1
        except ApiError as error:
            return count if "reads too slowly" in str(error) else 0
        return 0

    service.start()
    try:
        assert 0 < asyncio.run(asyncio.wait_for(read_slowly(), 20)) < 100
    finally:
        service.stop()


def test_several_answers_read_their_prompt_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    advance = engine._network.advance

    def noted(blocks: Any, rows: Any, sequences: Any) -> None:
        read.append(sum(ids.size for ids in sequences))
        advance(blocks, rows, sequences)

    monkeypatch.setattr(engine._network, "advance", noted)
    prompt = "Once upon a time there was a king. " * 6
    body = {"prompt": prompt, "n": 4, "max_tokens": 3, "seed": 7}
    with client_of(engine) as client:
        found = client.post("/v1/completions", json=body).json()
    length = len(engine.tokenize(prompt))
    assert sum(read) < length + 4 * 3
    assert found["usage"]["prompt_tokens"] == length
    assert found["usage"]["completion_tokens"] == 12
    for row, choice in enumerate(found["choices"]):
        expected = engine.generate(prompt, max_new_tokens=3, temperature=1.0, seed=7 + row)
        assert choice["text"] == expected.text


def test_offsets_in_a_stream_go_on(engine: Engine) -> None:
    body = {"prompt": "ROMEO:", "max_tokens": 6, "temperature": 0, "logprobs": 1, "n": 2}
    offsets: list[list[int]] = [[], []]
    with client_of(engine) as client:
        whole = client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
        for line in client.post("/v1/completions", json=body | {"stream": True}).text.split("\n"):
            if line.startswith("data: {"):
                (choice,) = json.loads(line[6:])["choices"]
                offsets[choice["index"]] += choice["logprobs"]["text_offset"]
    assert offsets == [whole["text_offset"]] * 2


def test_parts_of_characters_in_log_probabilities(engine: Engine) -> None:
    """Two tokens with the same text are told apart, by their bytes too."""
    piece = TokenOutput("", (0xC3,), -1.0, ((0xC3, -1.0), (0xC4, -2.0), (65, -3.0)))
    assert logprobs.of_completion(engine, [piece])["top_logprobs"] == [
        {"\ufffd": -1.0, "token_id:196": -2.0, "A": -3.0}
    ]
    (token,) = logprobs.of_chat(engine, [piece])["content"]
    assert token["bytes"] == [0xC3]
    assert [one["bytes"] for one in token["top_logprobs"]] == [[0xC3], [0xC4], [65]]


def test_a_client_that_goes_while_it_is_submitted_leaves_nothing(engine: Engine) -> None:
    service = Service({"m": engine}, {}, Settings(shutdown_seconds=0))
    service.start()
    submit, entered = service.scheduler.submit, threading.Event()

    def slowly(*args: Any) -> Any:
        entered.set()
        time.sleep(0.05)
        return submit(*args)

    service.scheduler.submit = slowly  # type: ignore[method-assign]

    async def go_away() -> None:
        requests = [Request(np.array([65]), Sampling(max_new_tokens=10**6), "m")] * 3
        first = asyncio.ensure_future(anext(service.events(requests)))
        await asyncio.to_thread(entered.wait)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)

    try:
        asyncio.run(go_away())
        deadline = time.monotonic() + 10
        while service.scheduler.running + service.scheduler.waiting:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        service.stop()


def test_a_stream_hears_of_the_end(engine: Engine) -> None:
    application = app({"m": engine}, {}, Settings())
    config = uvicorn.Config(application, port=0, log_level="warning", timeout_graceful_shutdown=5)
    stop, is_up = application.state.service.stop, threading.Event()
    server = listening._Server(config, is_up.set, stop, 60.0)
    thread = threading.Thread(target=server.run)
    thread.start()
    is_up.wait()
    port = server.servers[0].sockets[0].getsockname()[1]
    body = {"prompt": "a", "max_tokens": 10**6}
    address = f"http://127.0.0.1:{port}/v1/completions"
    with (
        httpx.Client(timeout=20) as other,
        httpx.stream("POST", address, json=body | {"stream": True}, timeout=20) as answer,
    ):
        server.should_exit = True
        short = body | {"max_tokens": 1}
        while (refused := other.post(address, json=short)).is_success:
            pass
        assert (refused.status_code, "shutting down" in refused.text) == (503, True)
        stop(0.0)  # the time is over
        last = [line for line in answer.iter_lines() if line][-1]
    assert "shutting down" in json.loads(last.removeprefix("data: "))["error"]["message"]
    thread.join()


def test_a_second_signal_ends_at_once_and_says_so(engine: Engine) -> None:
    """What runs hears of it, and the application's own end comes, not a traceback."""
    application = app({"m": engine}, {}, Settings())
    config = uvicorn.Config(application, port=0, log_level="warning", timeout_graceful_shutdown=5)
    is_up = threading.Event()
    server = listening._Server(config, is_up.set, application.state.service.stop, 60.0)
    thread = threading.Thread(target=server.run)
    thread.start()
    is_up.wait()
    port = server.servers[0].sockets[0].getsockname()[1]
    body = {"prompt": "a", "max_tokens": 10**6, "stream": True}
    with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.should_exit = server.force_exit = True
        last = [line for line in lines if line][-1]
    assert "shutting down" in json.loads(last.removeprefix("data: "))["error"]["message"]
    thread.join()
    assert server.lifespan.shutdown_event.is_set()


def test_no_second_server_at_the_port_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows must be asked for that, and SO_REUSEADDR asks it for the opposite."""
    asked = []

    class Socket(socket.socket):
        def setsockopt(self, *arguments: Any) -> None:
            asked.append(arguments)

    monkeypatch.setattr(socket, "SO_EXCLUSIVEADDRUSE", -5, raising=False)
    monkeypatch.setattr(socket, "socket", Socket)
    with pytest.raises(InputError, match=r"cannot listen at 'nowhere\.invalid'"):
        listening.listen(Starlette(), "nowhere.invalid", 0, 1.0, print)
    assert asked == [(socket.SOL_SOCKET, -5, 1)]
