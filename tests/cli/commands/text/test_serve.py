"""`anymamba serve`: it says where it is, answers, and ends when it is told to."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from anymamba import load
from anymamba.cli.main import main

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")


@contextmanager
def started(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The program and its address."""
    command = [sys.executable, "-m", "anymamba", "serve", "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as program:
        assert program.stderr is not None
        line = program.stderr.readline()
        try:
            assert "is served at http://127.0.0.1:" in line, line + program.stderr.read()
            yield program, line.split(" at ")[1].split(";")[0]
        finally:
            program.kill()


def test_it_serves_and_ends(tmp_path: Path) -> None:
    text = "Once upon a time. " * 20
    usage = []
    for _ in range(2):  # over a restart too, nothing is read again
        with started("--cache-dir", str(tmp_path), "--name", "bard") as (program, address):
            body = {"model": "bard", "prompt": text, "max_tokens": 3}
            usage.append(httpx.post(f"{address}/completions", json=body).json()["usage"])
            program.send_signal(signal.SIGTERM)
            program.wait(20)
    cached = [found["prompt_tokens_details"]["cached_tokens"] for found in usage]
    assert cached == [0, usage[0]["prompt_tokens"]]


def test_a_key_and_no_page(tmp_path: Path) -> None:
    with started("--api-key", "sesame", "--no-page") as (_, address):
        assert httpx.get(f"{address.removesuffix('/v1')}/").status_code == 404
        assert httpx.get(f"{address}/models").status_code == 401
        found = httpx.get(f"{address}/models", headers={"authorization": "Bearer sesame"})
        assert [model["id"] for model in found.json()["data"]] == ["bundled"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "70000"], "70000 is too large"),
        (["--cache-memory", "much"], "'much' is not a size such as 500M"),
        (["--api-key", ""], "the API key is empty"),
        (["--host", "nowhere.invalid"], "cannot listen at 'nowhere.invalid'"),
        (["--host", ""], "the host is empty"),
        (["--adapters", "nowhere"], "there is no folder 'nowhere'"),
        (["--adapters", "a", "--adapter", "b"], "not both"),
        (["--shutdown-seconds", "-1"], "is out of range"),
        (["--cache-dir", __file__], "cannot be used"),
    ],
)
def test_mistakes(options: list[str], message: str) -> None:
    command = [sys.executable, "-m", "anymamba", "serve", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "warns"),
    [(["--host", "0.0.0.0"], True), (["--host", "0.0.0.0", "--api-key", "a"], False), ([], False)],
)
def test_an_open_server_without_a_key_warns(
    options: list[str],
    warns: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("anymamba.server.listening.listen", lambda *_: None)
    main(["serve", *options])
    assert ("warning: whoever reaches 0.0.0.0" in capsys.readouterr().err) == warns


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "anymamba", "serve", "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"port {port}: Address already in use" in done.stderr


def test_limits_and_adapters_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each option reaches what it is for, and what is served is said."""
    engine = load()
    name = "backbone.layers.0.mixer.out_proj.weight"
    n, k = engine.weights.tensors[name].shape
    place = f"base_model.model.{name.removesuffix('.weight')}.lora_"
    (tmp_path / "bard").mkdir()
    factors = {"A": np.ones((1, k), np.float32), "B": np.ones((n, 1), np.float32)}
    tensors = {f"{place}{part}.weight": factor for part, factor in factors.items()}
    save_file(tensors, tmp_path / "bard" / "adapter_model.safetensors")
    config = json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1})
    (tmp_path / "bard" / "adapter_config.json").write_text(config)
    services = []

    def listen(application: Any, host: str, port: int, seconds: float, tell: Any) -> None:
        services.append(application.state.service)
        tell("http://a:1")

    monkeypatch.setattr("anymamba.server.listening.listen", listen)
    limits = {
        "prompt-tokens": 11,
        "most-tokens": 12,
        "body-size": 13,
        "chunk-tokens": 14,
        "shutdown-seconds": 1.5,
        "state-memory": 16,
    }
    options = [part for key, value in limits.items() for part in (f"--{key}", str(value))]
    main(["serve", "--adapters", str(tmp_path), *options])
    settings, said = services[0].settings, capsys.readouterr().err
    assert (settings.prompt_tokens, settings.most_tokens, settings.body_bytes) == (11, 12, 13)
    assert (settings.chunk_tokens, settings.shutdown_seconds) == (14, 1.5)
    assert settings.state_bytes == 16
    assert list(services[0].engines) == ["bundled", "bundled:bard"]
    assert "bundled is served at http://a:1/v1" in said
    assert "3,045,888 parameters in bf16 take 6.1 MB, each of 16 texts at a time" in said
    assert f"bundled:bard takes {2 * n * k / 1e3:.1f} kB more" in said
