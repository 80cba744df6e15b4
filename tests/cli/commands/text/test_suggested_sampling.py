"""A model's generation_config.json: its sampling is used and told, and options come first."""

import json
import shutil
from pathlib import Path

import pytest

import anymamba as package
from anymamba.errors import CheckpointError
from tests.support.cli import Command

ASKED = ("--max-new-tokens", 12, "--seed", 3)


def with_settings(tiny: Path, folder: Path, **settings: object) -> Path:
    shutil.copytree(tiny, folder)
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def test_it_is_used_and_told(tiny: Path, tmp_path: Path, anymamba: Command) -> None:
    settings = {"do_sample": True, "temperature": 1.7, "top_k": 9, "repetition_penalty": 1.3}
    model = with_settings(tiny, tmp_path / "model", **settings)
    by_file = anymamba("generate", "a", "--model", model, *ASKED, "--json")
    options = ("--temperature", 1.7, "--top-k", 9, "--repetition-penalty", 1.3)
    by_options = anymamba("generate", "a", "--model", tiny, *ASKED, *options, "--json")
    usual = anymamba("generate", "a", "--model", tiny, *ASKED, "--json")
    assert by_file.json["text"] == by_options.json["text"] != usual.json["text"]
    told = "generation_config.json says: temperature 1.7, top_k 9, repetition_penalty 1.3"
    assert told in by_file.err
    assert by_options.err == usual.err == ""


def test_options_come_first(tiny: Path, tmp_path: Path, anymamba: Command) -> None:
    model = with_settings(tiny, tmp_path / "model", do_sample=True, temperature=1.7, top_k=9)
    both = anymamba("generate", "a", "--model", model, *ASKED, "--temperature", 0, "--json")
    greedy = anymamba("generate", "a", "--model", tiny, *ASKED, "--temperature", 0, "--json")
    assert both.json["text"] == greedy.json["text"]
    assert "temperature" not in both.err
    assert "top_k 9" in both.err


def test_without_do_sample_a_temperature_suggests_nothing(
    tiny: Path, tmp_path: Path, anymamba: Command
) -> None:
    model = with_settings(tiny, tmp_path / "model", temperature=1.7, eos_token_id=3)
    found = anymamba("generate", "a", "--model", model, *ASKED, "--json")
    usual = anymamba("generate", "a", "--model", tiny, *ASKED, "--json")
    assert (found.json["text"], found.err) == (usual.json["text"], "")


def test_python_uses_it_where_asked_to(tiny: Path, tmp_path: Path) -> None:
    model = with_settings(tiny, tmp_path / "model", do_sample=True, temperature=1.7)
    engine = package.load(model)
    assert engine.suggested_sampling == {"temperature": 1.7}
    sampling = package.Sampling(**engine.suggested_sampling, seed=3, max_new_tokens=12)
    assert not sampling.greedy
    greedy = engine.generate("a", max_new_tokens=12)
    assert greedy.ids == package.load(tiny).generate("a", max_new_tokens=12).ids


@pytest.mark.parametrize(
    "settings", [{"temperature": "hot"}, {"top_p": 2}, {"top_k": -1}, {"repetition_penalty": 0}]
)
def test_a_value_that_makes_no_sense_is_refused(
    settings: dict[str, object], tiny: Path, tmp_path: Path, anymamba: Command
) -> None:
    model = with_settings(tiny, tmp_path / "model", do_sample=True, **settings)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        package.load(model)
    assert next(iter(settings)) in anymamba("generate", "a", "--model", model).complaint
