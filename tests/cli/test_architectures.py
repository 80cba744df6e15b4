"""Every command runs with every architecture."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from tests.support.files import write_model
from tests.support.tolerance import assert_same

ARCHITECTURES = ("mamba", "falcon_mamba")
NEW = ("--max-new-tokens", 4, "--temperature", 0, "--json")


@pytest.fixture(params=ARCHITECTURES, scope="module")
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp(name), model_type=name)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("To be, or not to be: that is the question.\n" * 40)
    return path


def test_info(folder, name, anymamba):
    assert anymamba("info", folder, "--json").json["model_type"] == name
    assert name in anymamba("info", folder).out


def test_generate_chat_score_inspect_ingest_bench(folder, text, tmp_path, monkeypatch, anymamba):
    written = anymamba("generate", "To", "--model", folder, *NEW).json
    assert len(written["new_tokens"]) == 4
    through_torch = anymamba("generate", "To", "--model", folder, "--device", "cpu", *NEW).json
    assert through_torch["text"] == written["text"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n"), encoding="utf-8"))
    assert json.loads(anymamba("chat", "--model", folder, *NEW).out)["new_tokens"]
    assert anymamba("score", text, "--model", folder, "--json").json["perplexity"] > 1
    assert anymamba("inspect", "To be", "--model", folder, "--json").json["step_size"]
    state = tmp_path / "book.state"
    assert anymamba("ingest", text, "--model", folder, "--save-state", state).status == 0
    assert anymamba("generate", "To", "--model", folder, "--state", state, *NEW).json["new_tokens"]
    quick = ("--prompt-tokens", 8, "--new-tokens", 2, "--repeats", 1, "--threads", 1)
    assert len(anymamba("bench", folder, *quick, "--weights", "f32", "--json").json["speeds"]) == 1


def test_quantize_and_convert(folder, tmp_path, anymamba):
    expected = anymamba("generate", "To", "--model", folder, *NEW).json["text"]
    for layout, place in ("gguf", "model.gguf"), ("transformers", "copy"):
        done = anymamba("convert", folder, tmp_path / place, "--layout", layout)
        assert done.status == 0, done.err
        again = anymamba("generate", "To", "--model", tmp_path / place, *NEW).json
        assert again["text"] == expected
    done = anymamba("quantize", folder, tmp_path / "int8", "--weights", "int8", "--group", 32)
    assert done.status == 0, done.err
    assert anymamba("generate", "To", "--model", tmp_path / "int8", *NEW).json["new_tokens"]


@pytest.mark.slow
def test_finetune_and_merge(folder, name, tmp_path, anymamba):
    pytest.importorskip("trl")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "ab=", "completion": "xyz"}\n')
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    sizes = ("--rank", 2, "--max-steps", 2, "--batch-size", 1, "--max-length", 32)
    facts = anymamba("finetune", pairs, "--output", adapter, "--model", folder, *sizes, "--json")
    assert facts.json["steps"] == 2
    with_adapter = anymamba("generate", "ab=", "--model", folder, "--adapter", adapter, *NEW).json[
        "text"
    ]
    done = anymamba("merge", adapter, merged, "--model", folder)
    assert done.status == 0, done.err
    assert anymamba("generate", "ab=", "--model", merged, *NEW).json["text"] == with_adapter
    assert json.loads((merged / "config.json").read_text())["model_type"] == name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "sizes"), [("falcon_mamba", ()), ("mamba2", ("--head-dim", 8, "--groups", 2))]
)
def test_train_finetune_merge_and_convert(architecture, sizes, text, tmp_path, anymamba):
    """From nothing, through PyTorch, to files."""
    pytest.importorskip("trl")
    model, adapter, merged = (tmp_path / name for name in ("model", "adapter", "merged"))
    small = ("--hidden-size", 32, "--layers", 1, "--window", 16, "--batch", 2, "--steps", 2)
    given = ("--architecture", architecture, *sizes, *small, "--no-plot")
    done = anymamba("train", "--data", text, "--output", model, *given, "--json")
    assert done.json["steps"] == 2
    assert json.loads((model / "config.json").read_text())["model_type"] == architecture
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "ab=", "completion": "xyz"}\n')
    few = ("--rank", 2, "--max-steps", 1, "--batch-size", 1, "--max-length", 16)
    done = anymamba("finetune", pairs, "--output", adapter, "--model", model, *few)
    assert done.status == 0, done.err
    assert anymamba("merge", adapter, merged, "--model", model).status == 0
    expected = logits_of(merged)
    for name in ("merged.gguf", "copy"):
        assert anymamba("convert", merged, tmp_path / name).status == 0
        assert_same(logits_of(tmp_path / name), expected)


def logits_of(model):
    torch = pytest.importorskip("torch")
    from anymamba.modeling.auto import load_causal_lm

    with torch.no_grad():
        return load_causal_lm(model)(torch.arange(3, 20)[None]).logits
