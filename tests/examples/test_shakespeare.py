"""The training script: a few steps, and what it leaves behind."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

import anymamba
from anymamba.training.tokenizers import byte_symbols

SCRIPT = Path(__file__).parents[2] / "examples" / "shakespeare" / "train.py"
LINE = "The quick brown fox jumps over the lazy dog. "


@pytest.fixture(scope="module")
def scripts():
    """The example's files as modules, which they are to one another."""
    names = ("train", "validation", "byte_tokenizer", "model_card")
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(SCRIPT.parent))
        for name in names:
            del sys.modules[name]


def train(folder, *options):
    text = folder / "fox.txt"
    text.write_text(LINE * 60)
    sizes = {"layers": 1, "hidden-size": 16, "state-size": 4, "batch": 4, "window": 32}
    small = [f"--{name}={size}" for name, size in sizes.items()]
    command = [sys.executable, str(SCRIPT), "--data", str(text), "--output", str(folder / "model")]
    done = subprocess.run(
        [*command, *small, "--threads=1", *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a model that was trained for 40 steps, and what was printed meanwhile."""
    folder = tmp_path_factory.mktemp("fox")
    options = ("--steps", "40", "--report-every", "10", "--learning-rate", "0.02")
    return folder / "model", train(folder, *options)


def details(folder):
    return json.loads((folder / "training.json").read_text())


def test_it_learns_and_tells(trained):
    folder, out = trained
    lines = [line for line in out.splitlines() if "tokens/s" in line]
    losses = [float(line.split("loss")[1].split()[0]) for line in lines]
    assert len(losses) == 4
    # An even guess costs log(256) = 5.5.
    assert losses[0] > 4
    assert losses[-1] < 3
    assert "minutes left" in lines[0]
    record = details(folder)["record"]
    assert record["steps"] == 40
    assert record["train_bytes_read"] == 40 * 4 * 32
    assert record["curve"][-1]["step"] == 40
    assert record["cpu_seconds"] > 0


def test_both_libraries_load_the_result_to_equal_logits(trained):
    folder, _ = trained
    ours = anymamba.MambaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = transformers.MambaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(LINE, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        a, b = ours(ids).logits, theirs(ids).logits
    # The design's tolerance for whole models in float32.
    assert (a - b).abs().max() <= 1e-4 * max(1.0, float(b.abs().max()))


def test_weights_are_stored_in_bfloat16_and_nothing_half_written_stays(trained):
    folder, _ = trained
    stored = anymamba.MambaForCausalLM.from_pretrained(folder)
    assert stored.dtype == torch.bfloat16
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    ]


def test_the_figures_are_those_of_the_stored_weights(trained, scripts):
    folder, out = trained
    result = details(folder)["result"]
    model = anymamba.MambaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    data = torch.tensor(list((LINE * 60).encode()))
    validation = data[int(0.9 * len(data)) :]
    with torch.no_grad():
        windows = [
            torch.nn.functional.cross_entropy(model(part[None, :-1]).logits[0], part[1:])
            for part in validation.unfold(0, 33, 32)
        ]
        stream = model(validation[None], labels=validation[None]).loss
    assert result["validation_loss_windows"] == pytest.approx(float(sum(windows)) / len(windows))
    assert result["validation_loss_stream"] == pytest.approx(float(stream), rel=1e-4)
    # However short the stretches are, the carried state makes them one text.
    loss_of_stream = scripts.validation.loss_of_stream
    assert loss_of_stream(model, validation, stretch=7) == pytest.approx(float(stream), rel=1e-4)
    card = (folder / "README.md").read_text()
    for loss in (result["validation_loss_windows"], result["validation_loss_stream"]):
        assert f"{loss:.4f}" in card
        assert f"{loss:.4f}" in out


def test_the_best_model_is_kept(scripts, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 1.0, 1.0])
    saved = []
    monkeypatch.setattr(scripts.train, "loss_of_windows", lambda *_, **__: next(losses))
    monkeypatch.setattr(scripts.train, "save", lambda model, folder: saved.append(record.steps))
    recipe, record = scripts.train.Recipe(), scripts.train.Record()
    model = torch.nn.Linear(1, 1)
    for step in range(1, 6):
        record.steps = step
        scripts.train.keep_if_best(model, recipe, record, 9.0, None, SimpleNamespace(output="x"))
        assert model.training
    assert saved == [1, 2, 4]
    assert (record.best_step, record.best_loss) == (4, 1.0)
    assert [point["validation_loss"] for point in record.curve] == [3.0, 2.0, 2.5, 1.0, 1.0]


def test_the_learning_rate_rises_and_falls(scripts):
    recipe = scripts.train.Recipe(learning_rate=1.0, final_learning_rate=0.1, warm_up=0.2)
    rate = scripts.train.learning_rate
    assert rate(recipe, 0.1) == pytest.approx(0.5)
    assert rate(recipe, 0.2) == pytest.approx(1.0)
    assert rate(recipe, 0.6) == pytest.approx(0.55)
    assert rate(recipe, 1.0) == pytest.approx(0.1)
    assert rate(recipe, 1.5) == pytest.approx(0.1)


def test_only_matrices_decay(scripts):
    recipe = scripts.train.Recipe(hidden_size=16, layers=1)
    model = scripts.train.build_model(recipe)
    groups = scripts.train.build_optimizer(model, recipe).param_groups
    decaying, free = ({id(weight) for weight in group["params"]} for group in groups)
    names = {
        name.rpartition("mixer.")[2]
        for name, weight in model.named_parameters()
        if id(weight) in decaying
    }
    projections = {f"{name}_proj.weight" for name in ("in", "x", "dt", "out")}
    assert names == projections | {"backbone.embeddings.weight"}
    assert len(decaying) + len(free) == len(list(model.parameters()))
    assert (groups[0]["weight_decay"], groups[1]["weight_decay"]) == (0.1, 0.0)


def test_the_data_is_split_at_nine_tenths(scripts, tmp_path):
    (tmp_path / "text").write_bytes(bytes(range(256)))
    train_text, validation_text = scripts.train.read_text(tmp_path / "text")
    assert train_text.tolist() == list(range(230))
    assert validation_text.tolist() == list(range(230, 256))


def test_the_tokenizer_s_tokens_are_bytes(scripts):
    tokenizer = scripts.byte_tokenizer.byte_tokenizer()
    text = "naïve — 🎭\n\x00"
    assert tokenizer.encode(text).ids == list(text.encode())
    assert len(set(byte_symbols())) == 256


def test_an_untrained_model_guesses_evenly(scripts):
    torch.manual_seed(0)
    model = scripts.train.build_model(scripts.train.Recipe(layers=2)).eval()
    data = torch.randint(256, (300,))
    loss = scripts.validation.loss_of_windows(model, data, 64)
    assert loss == pytest.approx(math.log(256), abs=0.2)
