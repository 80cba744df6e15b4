"""A model so small that the command line answers at once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from anymamba.assets import bundled_model
from anymamba.cli.main import main

VOCABULARY, WIDTH, CHANNELS, STATES, RANK, WINDOW = 256, 16, 32, 16, 1, 4
SHAPES = {
    "backbone.embeddings.weight": (VOCABULARY, WIDTH),
    "backbone.layers.0.norm.weight": (WIDTH,),
    "backbone.layers.0.mixer.in_proj.weight": (2 * CHANNELS, WIDTH),
    "backbone.layers.0.mixer.conv1d.weight": (CHANNELS, 1, WINDOW),
    "backbone.layers.0.mixer.conv1d.bias": (CHANNELS,),
    "backbone.layers.0.mixer.x_proj.weight": (RANK + 2 * STATES, CHANNELS),
    "backbone.layers.0.mixer.dt_proj.weight": (CHANNELS, RANK),
    "backbone.layers.0.mixer.dt_proj.bias": (CHANNELS,),
    "backbone.layers.0.mixer.A_log": (CHANNELS, STATES),
    "backbone.layers.0.mixer.D": (CHANNELS,),
    "backbone.layers.0.mixer.out_proj.weight": (WIDTH, CHANNELS),
    "backbone.norm_f.weight": (WIDTH,),
    # A head of its own: with the embeddings for a head a random model says one word again
    # and again.
    "lm_head.weight": (VOCABULARY, WIDTH),
}


def write_model(folder: Path, **settings: Any) -> Path:
    """A random model of bytes in `folder`, always the same. Needs no torch."""
    random = np.random.default_rng(0)
    # Logits far apart, so that the likeliest token has no rival.
    weights = {
        name: (0.5 * random.standard_normal(shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }
    for name in ("backbone.norm_f.weight", "backbone.layers.0.norm.weight"):
        weights[name] = np.ones(WIDTH, np.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    names: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = {
        "model_type": "mamba",
        "architectures": ["MambaForCausalLM"],
        "dtype": "float32",
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": 1,
        "state_size": STATES,
        "time_step_rank": RANK,
        "conv_kernel": WINDOW,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config | names | settings))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_model() / name, folder)
    return folder


def with_head(tiny: Path, folder: Path, change: Callable[[Any], Any]) -> Path:
    """The tiny model with another head."""
    shutil.copytree(tiny, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = change(tensors["lm_head.weight"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model without any special token."""
    return write_model(tmp_path_factory.mktemp("tiny"))


def buffered() -> dict[str, str]:
    """An environment in which Python buffers its output, as it does where nothing is set."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@dataclass(frozen=True)
class Done:
    """What a command did."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The output, which must be one JSON value."""
        assert self.status == 0, self.err
        return json.loads(self.out)

    @property
    def complaint(self) -> str:
        """The error, which must be one line, with nothing on standard output."""
        assert self.status == 2
        assert self.out == ""
        assert self.err.startswith("anymamba: ")
        assert self.err.count("\n") == 1
        return self.err


Command = Callable[..., Done]


@pytest.fixture
def anymamba(capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs the command line in this process."""

    def run(*arguments: object) -> Done:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Done(status, captured.out, captured.err)

    return run
