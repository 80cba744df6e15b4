"""A model that comes without a tokenizer: tokens and their numbers go, texts are refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import anymamba
from anymamba import Engine
from tests.server.conftest import serving
from tests.support.files import write_small

httpx = pytest.importorskip("httpx")

IDS = [1, 2, 3]
FEW = {"prompt": IDS, "max_tokens": 2, "temperature": 0}


@pytest.fixture(scope="module")
def mute(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return anymamba.load(write_small(tmp_path_factory.mktemp("mute")))


@pytest.fixture(scope="module")
def http(mute: Engine) -> Iterator[Any]:
    with serving(mute) as address, httpx.Client(base_url=address) as client:
        yield client


def logprobs(engine: Engine, ids: list[int]) -> Any:
    """What comes after a text, (v) float64."""
    logits_v = engine.logits(ids)[-1].astype(np.float64)
    return logits_v - np.log(np.exp(logits_v - logits_v.max()).sum()) - logits_v.max()


@pytest.mark.parametrize("streams", [False, True])
def test_log_probabilities_name_tokens_by_their_numbers(
    http: Any, mute: Engine, streams: bool
) -> None:
    body = {**FEW, "max_tokens": 1, "logprobs": 2, "echo": True, "stream": streams}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200
    if streams:
        (line, _) = (line for line in answer.text.splitlines() if line)
        (choice,) = httpx.Response(200, text=line.removeprefix("data: ")).json()["choices"]
    else:
        (choice,) = answer.json()["choices"]
    found = choice["logprobs"]
    after_v = logprobs(mute, IDS)
    best, second = (int(id) for id in np.argsort(after_v)[:-3:-1])
    assert choice["text"] == ""
    assert found["tokens"] == [f"token_id:{id}" for id in (*IDS, best)]
    assert list(found["top_logprobs"][-1]) == [f"token_id:{best}", f"token_id:{second}"]
    expected = [logprobs(mute, IDS[:at])[IDS[at]] for at in (1, 2)]
    # The core's sums and NumPy's differ by float32's rounding.
    assert found["token_logprobs"][1:3] == pytest.approx(expected, abs=1e-4)
    assert found["token_logprobs"][-1] == pytest.approx(after_v[best], abs=1e-4)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {**FEW, "prompt": "text"}),
        ("/v1/completions", {**FEW, "echo": True}),
        ("/v1/completions", {**FEW, "stop": "text"}),
        ("/v1/embeddings", {"input": "text"}),
        ("/v1/states", {"input": "text"}),
        ("/tokenize", {"prompt": "text"}),
        ("/detokenize", {"tokens": IDS}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "text"}]}),
    ],
)
def test_texts_are_the_client_s_mistake(http: Any, path: str, body: dict[str, Any]) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code == 400
    assert "without a tokenizer" in answer.json()["error"]["message"]
