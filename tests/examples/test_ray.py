"""The examples for several machines: Ray on this one, with the bundled model."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from anymamba import Engine

pytest.importorskip("ray.serve")
pytest.importorskip("ray.data")
httpx = pytest.importorskip("httpx")

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[2] / "examples"
RAY = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_USAGE_STATS_ENABLED": "0",
}
START = """
import socket, sys
import ray
from ray import serve
import application

context = ray.init(num_cpus=8, include_dashboard=False, object_store_memory=100 << 20)
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
serve.start(http_options={"host": "127.0.0.1", "port": port})
serve.run(application.build({}))
print("ready", port, context.address_info["address"], flush=True)
sys.stdin.read()
ray.shutdown()
"""


@pytest.fixture(scope="module")
def engine() -> Engine:
    import anymamba

    return anymamba.load()


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, str]]:
    """The server's address, and the cluster's."""
    environment = os.environ | RAY | {"PYTHONPATH": str(EXAMPLES / "ray_serve")}
    command = [sys.executable, "-c", START]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, env=environment, **pipes) as program:
        assert program.stdout is not None
        lines = iter(program.stdout.readline, "")
        ready = next((line.split() for line in lines if line.startswith("ready ")), None)
        assert ready is not None, "Ray Serve did not start"
        yield f"http://127.0.0.1:{ready[1]}", ready[2]
        program.communicate("")


def test_ray_serve_answers_as_the_server_does(cluster: tuple[str, str], engine: Engine) -> None:
    address, _ = cluster
    with httpx.Client(base_url=address, timeout=60) as client:
        assert client.get("/health").json()["status"] == "ok"
        assert "<title>AnyMamba</title>" in client.get("/").text
        asked = {"prompt": "ROMEO:", "max_tokens": 8, "temperature": 0}
        found = client.post("/v1/completions", json=asked).json()
        text = engine.generate("ROMEO:", max_new_tokens=8).text
        assert found["choices"][0]["text"] == text
        with client.stream("POST", "/v1/completions", json={**asked, "stream": True}) as stream:
            lines = [line for line in stream.iter_lines() if line.startswith("data: {")]
        pieces = [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines]
        assert "".join(pieces) == text
        assert client.post("/v1/completions", json={"prompt": 3}).status_code == 400
        assert client.post("/v1/completions", content=b"{").status_code == 415


def test_ray_serve_sends_a_conversation_to_the_replica_that_knows_it(
    cluster: tuple[str, str],
) -> None:
    with httpx.Client(base_url=cluster[0], timeout=60) as client:
        for name in ("ROMEO", "JULIET", "HAMLET", "OTHELLO"):  # on two replicas
            prompt, tokens = f"{name}: " + "so be it, " * 8, 0
            for _ in range(3):
                asked = {"prompt": prompt, "max_tokens": 4, "temperature": 0}
                found = client.post("/v1/completions", json=asked).json()
                assert found["usage"]["prompt_tokens_details"]["cached_tokens"] >= tokens
                # The answer's last token has been read by nobody yet.
                tokens = found["usage"]["total_tokens"] - 1
                prompt += found["choices"][0]["text"] + " Speak on."


def test_ray_serve_frees_what_a_client_leaves(cluster: tuple[str, str]) -> None:
    session = {"x-session-id": "a session goes to one replica"}
    asked = {"prompt": "ROMEO:", "max_tokens": 100_000, "stream": True}
    with httpx.Client(base_url=cluster[0], timeout=60, headers=session) as client:
        with client.stream("POST", "/v1/completions", json=asked) as stream:
            lines = stream.iter_lines()  # to let it go is to hang up
            assert next(lines).startswith("data: {")
            assert client.get("/health").json()["running"] == 1
        while client.get("/health").json()["running"]:
            pass


def test_ray_data_completes_a_file(
    cluster: tuple[str, str], engine: Engine, tmp_path: Path
) -> None:
    prompts = ["ROMEO:", "JULIET:", "To be", "Once more", "Out,"]
    lines = [json.dumps({"id": i, "prompt": prompt}) for i, prompt in enumerate(prompts)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    script = EXAMPLES / "ray_data" / "complete.py"
    options = ["prompts.jsonl", "answers", "--max-new-tokens", "8", "--batch", "2"]
    done = subprocess.run(
        [sys.executable, str(script), *options],
        cwd=tmp_path,
        env=os.environ | RAY | {"RAY_ADDRESS": cluster[1]},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    files = sorted((tmp_path / "answers").iterdir())
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    completed = {row["id"]: row["completion"] for row in rows}
    assert completed == {
        i: engine.generate(prompt, max_new_tokens=8).text for i, prompt in enumerate(prompts)
    }
