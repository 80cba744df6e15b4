"""Adapters by request: which are there, whose memory is whose, and that no two are mixed up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from starlette.testclient import TestClient

import anymamba
from anymamba import Engine
from anymamba.assets import bundled_model
from anymamba.cli.load_adapters import adapters_in, own_bytes
from anymamba.errors import InputError
from anymamba.runtime.chat.model_template import ChatTemplate
from anymamba.runtime.loading import load_adapters
from anymamba.server import Settings, app
from tests.server.conftest import TEMPLATE
from tests.support.files import write_small

RANK = 2
NAMES = ("bard", "clerk")
FILE = {"content-type": "application/octet-stream"}


def write_adapter(base: Engine, folder: Path, seed: int, module: str = "in_proj") -> Path:
    """A LoRA of one matrix in each layer, as PEFT writes it."""
    folder.mkdir(parents=True)
    random, tensors = np.random.default_rng(seed), {}
    for name, weight in base.weights.tensors.items():
        if name.endswith(f"{module}.weight"):
            n, k = weight.shape
            place = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            tensors[f"{place}A.weight"] = random.standard_normal((RANK, k)).astype(np.float32)
            tensors[f"{place}B.weight"] = random.standard_normal((n, RANK)).astype(np.float32)
    fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    size = {"hidden_size": 128, "time_step_rank": 8, "vocab_size": 64}
    return write_small(tmp_path_factory.mktemp("model"), **size)


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(NAMES):
        write_adapter(anymamba.load(model), place / name, seed)
    return place


@pytest.mark.parametrize("weights", ["auto", "f32", "bf16", "int8", "int4"])
def test_an_adapter_is_merged_and_shares_the_rest(
    model: Path, adapters: Path, weights: str
) -> None:
    base = anymamba.load(model, weights)
    folders = adapters_in(str(adapters), 8, print)
    engines = load_adapters(base, model, folders, weights)
    assert list(engines) == ["bard", "clerk"]
    for name, engine in engines.items():
        alone = anymamba.load(model, weights, adapter=adapters / name)
        assert engine.identity.digest == alone.identity.digest != base.identity.digest
        assert (engine.logits([1, 2, 3]) == alone.logits([1, 2, 3])).all()
        changed = {
            key
            for key, tensor in engine.weights.tensors.items()
            if tensor is not base.weights.tensors[key]
        }
        assert changed == {key for key in engine.weights.tensors if "in_proj" in key}
        taken = sum(engine.weights.tensors[key].nbytes for key in changed)
        assert own_bytes(engine, base) == taken < base.weight_bytes


@pytest.fixture(scope="module")
def engines(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Engine]:
    place = tmp_path_factory.mktemp("bundled")
    folders = {name: write_adapter(engine, place / name, seed) for seed, name in enumerate(NAMES)}
    found = load_adapters(engine, bundled_model(), folders)
    return {"base": engine} | {f"base:{name}": adapted for name, adapted in found.items()}


@pytest.fixture(scope="module")
def client(engines: dict[str, Engine]) -> Iterator[TestClient]:
    with TestClient(app(engines, {}, Settings(shutdown_seconds=0, parallel=2))) as made:
        yield made


def asked(client: TestClient, model: str, ids: list[int], **fields: Any) -> Any:
    body = {"model": model, "prompt": ids, "max_tokens": 6, "temperature": 0, "logprobs": 0}
    return client.post("/v1/completions", json={**body, **fields})


def test_each_answers_by_its_own_weights(client: TestClient, engines: dict[str, Engine]) -> None:
    listed = client.get("/v1/models").json()["data"]
    assert [entry["id"] for entry in listed] == ["base", "base:bard", "base:clerk"]
    assert client.get("/v1/models/base:bard").json()["id"] == "base:bard"
    found = {}
    for name, engine in engines.items():
        answer = asked(client, name, [1, 2, 3])
        assert answer.json()["model"] == name
        expected = engine.generate([1, 2, 3], 6, top_logprobs=0).logprobs
        found[name] = answer.json()["choices"][0]["logprobs"]["token_logprobs"]
        assert found[name] == expected
        vector = client.post("/v1/embeddings", json={"model": name, "input": [1, 2]}).json()
        assert np.allclose(vector["data"][0]["embedding"], engine.embed([[1, 2]])[0], atol=1e-5)
    assert len({str(values) for values in found.values()}) == 3


@pytest.mark.parametrize("path", ["completions", "chat/completions", "embeddings", "states"])
def test_an_unknown_adapter_is_404_by_name(client: TestClient, path: str) -> None:
    answer = client.post(f"/v1/{path}", json={"model": "base:nobody"})
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "'base:nobody' is not served here" in error["message"]
    assert "'base:clerk'" in error["message"]


def test_the_cache_knows_adapters_apart(client: TestClient) -> None:
    ids = [5, 6, 7, 8, 9]
    for name, miss in (
        ("base:bard", "no such prefix"),
        ("base:bard", None),
        ("base:clerk", "other adapter"),
        ("base", "other adapter"),
        ("base:clerk", None),
    ):
        answer = asked(client, name, ids)
        cached = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert answer.headers.get("x-anymamba-cache-miss") == miss, name
        assert cached == (0 if miss else len(ids))


def test_a_state_of_another_adapter_is_refused(client: TestClient) -> None:
    made = client.post("/v1/states", json={"model": "base:bard", "input": [1, 2]}).json()
    assert asked(client, "base:bard", [3], state=made["id"]).status_code == 200
    for other in ("base", "base:clerk"):
        answer = asked(client, other, [3], state=made["id"])
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "state_of_another_model"
    data = client.get(f"/v1/states/{made['id']}/file").content
    for name, status in (("base:bard", 201), ("base", 400), ("base:clerk", 400)):
        answer = client.post("/v1/states/file", params={"model": name}, content=data, headers=FILE)
        assert answer.status_code == status, name


def test_an_adapter_chats_by_its_model_s_template(engines: dict[str, Engine]) -> None:
    bundled = anymamba.load()
    templates = {name: ChatTemplate(TEMPLATE, {}) for name in ("m", "m:a")}
    with TestClient(app({"m": bundled, "m:a": bundled}, templates)) as client:
        body = {"model": "m:a", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
        assert client.post("/v1/chat/completions", json=body).status_code == 200


def test_what_is_no_folder_of_adapters_is_refused(adapters: Path, tmp_path: Path) -> None:
    said: list[object] = []
    with pytest.raises(InputError, match="there is no folder"):
        adapters_in(str(tmp_path / "none"), 8, said.append)
    with pytest.raises(InputError, match="is an adapter itself"):
        adapters_in(str(adapters / "bard"), 8, said.append)
    with pytest.raises(InputError, match=r"has 2 adapters, expected 1 to 1.*--most-adapters"):
        adapters_in(str(adapters), 1, said.append)
    (tmp_path / "logs").mkdir()
    (tmp_path / ".git").mkdir()
    with pytest.raises(InputError, match="has 0 adapters"):
        adapters_in(str(tmp_path), 8, said.append)
    (line,) = said
    assert "logs' is no adapter, and is left out" in str(line)
