"""States as things that clients hold: read once, continued from often."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from anymamba import Engine
from tests.server.conftest import serving

FILE = {"content-type": "application/octet-stream"}
TEXT = "Once upon a time there was a king. " * 10


@pytest.fixture(scope="module")
def http(address: str) -> Any:
    with httpx.Client(base_url=address, timeout=20) as client:
        yield client


def create(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = http.post("/v1/states", json={"model": "m", **fields})
    assert answer.status_code == 201, answer.text
    return answer.json()


def test_many_answers_to_one_text_that_is_read_once(http: httpx.Client, engine: Engine) -> None:
    state = create(http, input=TEXT)
    assert state["tokens"] == len(engine.tokenize(TEXT))
    for question in ("ROMEO:", "JULIET:", ""):
        body = {"model": "m", "prompt": question, "state": state["id"], "max_tokens": 8}
        found = http.post("/v1/completions", json=body | {"temperature": 0}).json()
        expected = engine.generate(TEXT + question, max_new_tokens=8).text
        assert found["choices"][0]["text"] == expected
        assert found["usage"]["prompt_tokens_details"]["cached_tokens"] == state["tokens"]
    assert http.get(f"/v1/states/{state['id']}").json() == state


def test_a_state_is_extended_and_forked(http: httpx.Client, engine: Engine) -> None:
    first = create(http, input="To be, ")
    longer = create(http, input="or not ", state=first["id"])
    assert longer["tokens"] == len(engine.tokenize("To be, or not "))
    fork = http.post(f"/v1/states/{longer['id']}/fork").json()
    assert fork["id"] != longer["id"]
    assert http.delete(f"/v1/states/{longer['id']}").json()["deleted"]
    assert http.get(f"/v1/states/{longer['id']}").status_code == 404
    body = {"model": "m", "prompt": "to", "state": fork["id"], "max_tokens": 5, "temperature": 0}
    found = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert found == engine.generate("To be, or not to", max_new_tokens=5).text


def test_a_file_there_and_back(http: httpx.Client, engine: Engine, tmp_path: Path) -> None:
    state = create(http, input=TEXT)
    data = http.get(f"/v1/states/{state['id']}/file").content
    (tmp_path / "king.state").write_bytes(data)
    assert engine.load_state(tmp_path / "king.state").token_count == state["tokens"]
    sent = http.post("/v1/states/file", params={"model": "m"}, content=data, headers=FILE)
    assert (sent.status_code, sent.json()["tokens"]) == (201, state["tokens"])
    for broken in (b"", data[:100], data[:-1], b"\xff" * 1000):
        refused = http.post("/v1/states/file", params={"model": "m"}, content=broken, headers=FILE)
        assert refused.status_code == 400, refused.text
        assert refused.json()["error"]["code"] == "invalid_state"
        assert "/tmp" not in refused.text


def test_a_state_of_another_model_is_refused(http: httpx.Client) -> None:
    state = create(http, input="To be")
    body = {"model": "m:adapter", "prompt": "a", "state": state["id"]}
    refused = http.post("/v1/completions", json=body)
    assert refused.status_code == 400
    assert "belongs to model 'm', and not to 'm:adapter'" in refused.json()["error"]["message"]
    missing = http.post("/v1/completions", json=body | {"state": "state-none"})
    assert missing.status_code == 404


def test_the_budget_holds(engine: Engine) -> None:
    size = engine.prefill(engine.state(), "a").nbytes
    with serving(engine, state_bytes=2 * size) as address, httpx.Client(base_url=address) as http:
        states = [create(http, input="a") for _ in range(2)]
        refused = http.post("/v1/states", json={"input": "a"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (507, "out_of_memory")
        http.delete(f"/v1/states/{states[0]['id']}")
        create(http, input="a")


def test_ids_cannot_be_guessed(http: httpx.Client) -> None:
    ids = {create(http, input="a")["id"] for _ in range(5)}
    assert len(ids) == 5
    assert all(len(name) > 24 for name in ids)
