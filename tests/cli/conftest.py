"""A model so small that the command line answers at once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from anymamba import MambaConfig, MambaForCausalLM
from anymamba.assets import bundled_model
from anymamba.cli.main import main


def write_model(folder: Path, **settings: Any) -> Path:
    """A random model of bytes in `folder`, always the same."""
    torch.manual_seed(0)
    names: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    # Logits far apart, so that the likeliest token has no rival; a head of its own, because with
    # the embeddings for a head a random model says one word again and again.
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "initializer_range": 0.5}
    sizes["tie_word_embeddings"] = False
    config = MambaConfig(vocab_size=256, **sizes, **(names | settings))
    MambaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_model() / name, folder)
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
