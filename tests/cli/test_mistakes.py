"""Every mistake is one true line on standard error and status 2, with every command."""

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from anymamba.cli import main as command_line
from anymamba.cli.main import COMMANDS, build_parser, main
from tests.cli.options.test_common_options import WITH_PYTORCH, arguments
from tests.support.files import rewritten

# Those that open a model and need neither the network nor PyTorch.
WITH_MODEL = sorted({*COMMANDS} - WITH_PYTORCH - {"completion", "models", "download"})
NUMBERS = ["-1", "1e400", "nan", "inf", "-inf", "9" * 20, "1" * 5000, "0x10", ""]


def numeric_options(command: str) -> list[str]:
    parsers = build_parser([command])._actions
    found = next(a for a in parsers if isinstance(a, argparse._SubParsersAction))
    actions = found.choices[command]._actions
    return [a.option_strings[-1] for a in actions if a.type is not None and a.option_strings]


NOT_NUMBERS = {"--stop"}  # which takes texts


@pytest.mark.parametrize("command", sorted({*COMMANDS} - {"train"}))
def test_numbers_that_make_no_sense(
    command: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is opened for them: the parser refuses each."""
    for option in set(numeric_options(command)) - NOT_NUMBERS:
        for value in NUMBERS:
            if option.endswith("-penalty") and value == "-1":
                continue  # which makes tokens likelier
            words = {"chat": [], "quantize": ["x", "x"], "finetune": ["x", "--output", "y"]}
            given = [command, *words.get(command, ["x"]), f"{option}={value}"]
            assert main(given) == 2, (option, value)
            complaint = capsys.readouterr().err
            assert complaint.count("\n") == 1, complaint
            assert len(complaint) < 1300
            assert option in complaint or option[2:].replace("-", "_") in complaint, complaint


TRAINING = {
    "train": ("anymamba.training.settings", "Settings"),
    "finetune": ("anymamba.training.finetune.settings", "FinetuneSettings"),
}


@pytest.mark.parametrize("value", NUMBERS)
@pytest.mark.parametrize("command", TRAINING)
def test_settings_of_training_that_make_no_sense(
    command: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, name = TRAINING[command]
    settings = fields(getattr(import_module(module), name))
    unbounded = {"weight_decay", "gradient_clip", "learning_rate", "initializer_range", "minutes"}
    unbounded |= {"final_learning_rate", "alpha", "epochs"}
    for name in (e.name for e in settings if str(e.type).startswith(("int", "float"))):
        option = "--" + name.replace("_", "-")
        words = [command, "--data", "x", "--output", str(tmp_path / "run"), f"{option}={value}"]
        if name in unbounded and value == "9" * 20:
            continue  # a number like others
        assert main(words) == 2
        complaint = capsys.readouterr().err
        assert f"anymamba: {name} must be" in complaint, complaint
        assert complaint.count("\n") == 1
    assert not (tmp_path / "run").exists()


def broken(tiny: Path, folder: Path, name: str, value: float) -> Path:
    """The model with one number of a tensor replaced."""
    shutil.copytree(tiny, folder)
    tensor = load_file(folder / "model.safetensors")[name]
    tensor.reshape(-1)[5] = value
    rewritten(folder / "model.safetensors", **{name: tensor})
    return folder


MIXER = "backbone.layers.0.mixer"


@pytest.mark.parametrize("command", sorted({*WITH_MODEL} - {"info"}))
@pytest.mark.parametrize(
    ("name", "value"),
    [(f"{MIXER}.out_proj.weight", np.nan), (f"{MIXER}.D", np.inf), ("lm_head.weight", np.nan)],
)
def test_numbers_that_are_none_among_the_weights(
    command: str,
    name: str,
    value: float,
    tiny: Path,
    tmp_path: Path,
    anymamba: Any,
    typed: Callable[[bytes], None],
) -> None:
    typed(b"a\n")
    model = broken(tiny, tmp_path / "model", name, value)
    words = arguments(command, model, tmp_path)
    before = sorted(tmp_path.iterdir())
    done = anymamba(*words)
    if command == "inspect" and name.startswith("lm_head"):
        assert done.status == 0  # which looks at the layers alone
        return
    if command == "bench":
        assert done.status in (0, 2)  # a speed is right whatever the numbers are
        return
    assert done.status == 2, done.err
    assert done.err.splitlines()[-1].startswith("anymamba: ")
    assert name in done.err
    assert "NaN" in done.err
    assert sorted(tmp_path.iterdir()) == before  # nothing was written


def test_numbers_that_are_none_in_an_adapter(tiny: Path, tmp_path: Path, anymamba: Any) -> None:
    words = arguments("merge", tiny, tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name].reshape(-1)[0] = np.nan
    save_file(tensors, file)
    done = anymamba(*words)
    assert done.status == 2
    assert name in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", WITH_MODEL)
def test_in_a_folder_that_is_gone(
    command: str,
    tmp_path: Path,
    anymamba: Any,
    monkeypatch: pytest.MonkeyPatch,
    typed: Callable[[bytes], None],
) -> None:
    """Relative names mean nothing there."""
    words = arguments(command, tmp_path / "model", tmp_path)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    typed(b"a\n")
    (tmp_path / "gone").rmdir()
    done = anymamba(*(word.replace(f"{tmp_path}/", "") for word in words))
    assert done.status == 2, done.err
    told = [line for line in done.err.splitlines() if not line.startswith("measuring ")]
    assert len(told) == 1, done.err
    assert told[0].startswith("anymamba: ")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
)
def test_lack_of_memory(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(argv: Any) -> None:
        raise error

    monkeypatch.setattr(command_line, "run_command", fails)
    assert main(["info"]) == 2
    assert capsys.readouterr().err.startswith("anymamba: not enough memory: ")
    monkeypatch.setattr(error, "args", ("another",)) if not isinstance(error, MemoryError) else None
    if not isinstance(error, MemoryError):
        with pytest.raises(RuntimeError):
            main(["info"])


def test_info_notices_a_backend_that_there_is_not(
    monkeypatch: pytest.MonkeyPatch, anymamba: Any
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setenv("ANYMAMBA_BACKEND", "foo")
    done = anymamba("info")
    assert done.status == 2
    assert "ANYMAMBA_BACKEND: unknown backend 'foo'" in done.complaint
    monkeypatch.setenv("ANYMAMBA_BACKEND", "reference")
    assert json.loads(anymamba("info", "--json").out)["backend"] == "reference"


def test_a_full_disk_is_called_so_in_the_middle_of_a_gguf_file(
    tmp_path: Path, anymamba: Any
) -> None:
    """numpy, which writes tensors, says how much it wrote and not why."""
    pytest.importorskip("gguf")
    from anymamba.assets import bundled_model
    from tests.cli.test_full_disk import files_of_at_most

    with files_of_at_most(500 << 10):
        done = anymamba("convert", bundled_model(), tmp_path / "x.gguf")
    assert done.status == 2
    assert "File too large; choose a place that takes files of this size" in done.complaint
    assert not list(tmp_path.iterdir())
