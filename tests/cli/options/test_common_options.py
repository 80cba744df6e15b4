"""What all commands have in common: `--json`, `--offline`, and that PyTorch is not imported."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from anymamba.cli.main import COMMANDS
from tests.support import processes

# These run other people's programs, or train; their own tests hold them to the same.
WITH_PYTORCH = {"run", "train", "finetune", "evaluate"}
PROGRAM = """
import sys
from anymamba.cli.main import main
status = main(sys.argv[1:])
assert not {"torch", "transformers"} & set(sys.modules), "imported"
sys.exit(status)
"""


def arguments(command: str, model: object, folder: Path) -> list[str]:
    """A short use of each command, with a model that is not the bundled one."""
    (folder / "text.txt").write_text("To be, or not to be")
    (folder / "passages.jsonl").write_text('{"text": "to be or not to be"}\n')
    text, few = folder / "text.txt", ("--max-new-tokens", 2)
    effort = ("--weights", "f32", "--threads", 1, "--repeats", 1)
    options: dict[str, tuple[object, ...]] = {
        "generate": ("a", *few, "--model", model),
        "chat": (*few, "--model", model),
        "serve": ("--port", 0, "--model", model),
        "ingest": (text, "--save-state", folder / "a.state", "--model", model),
        "models": (),
        "download": (model,),
        "info": (model,),
        "score": (text, "--model", model),
        "lambada": (folder / "passages.jsonl", "--model", model),
        "bench": (model, *effort, "--prompt-tokens", 4, "--new-tokens", 2),
        "quantize": (model, folder / "out", "--group", 32),
        "convert": (model, folder / "out"),
        "merge": (write_adapter(folder / "adapter"), folder / "out", "--model", model),
        "inspect": ("To be", "--model", model, "--picture", folder / "out.html"),
        "completion": ("bash",),
    }
    return [command, *map(str, options[command])]


def write_adapter(folder: Path) -> Path:
    """An adapter of the tiny model."""
    folder.mkdir()
    fields = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    name = "base_model.model.backbone.layers.0.mixer.in_proj.lora_"
    shapes = {f"{name}A.weight": (1, 16), f"{name}B.weight": (64, 1)}
    tensors = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


# A server goes on until it is told to end, and answers in JSON.
@pytest.mark.parametrize("command", sorted({*COMMANDS} - WITH_PYTORCH - {"serve"}))
def test_json_is_one_object_without_pytorch(command: str, tiny: Path, tmp_path: Path) -> None:
    words = [*arguments(command, tiny, tmp_path), "--json"]
    done = processes.python("-c", PROGRAM, *words, input="a\n")
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout), dict)


@pytest.mark.parametrize("command", sorted({*COMMANDS} - WITH_PYTORCH - {"completion", "models"}))
def test_offline_a_model_that_is_not_here_is_refused_without_network(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anymamba: Callable[..., Any]
) -> None:
    def fail(*_: object, **__: object) -> None:
        pytest.fail("asked the network")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr(socket.socket, "connect", fail)
    words = arguments(command, "nobody/no-such-mamba", tmp_path)
    done = anymamba(*words, "--offline")
    assert (done.status, done.out) == (2, "")
    complaint = done.err.splitlines()[-1]
    assert complaint.startswith("anymamba: ")
    assert "nobody/no-such-mamba" in complaint
    assert "offline" in complaint
    assert "Traceback" not in done.err
    assert not (tmp_path / "out").exists()
