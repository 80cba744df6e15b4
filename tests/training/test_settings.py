"""Settings: what wins over what, and what is refused."""

from dataclasses import asdict
from pathlib import Path

import pytest

from anymamba.errors import ConfigError
from anymamba.training.pretrain.arguments import rate_at
from anymamba.training.settings import PRESETS, Settings, read_yaml, settings_from


def test_flags_win_over_the_file_and_the_file_over_its_preset(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("preset: tiny\nlayers: 5\nbatch: 3\nlearning_rate: 3e-3\n")
    found = settings_from(file, batch=7)
    assert (found.hidden_size, found.layers, found.batch) == (64, 5, 7)
    assert found.learning_rate == 0.003  # YAML reads 3e-3 as text


def test_a_budget_of_one_kind_replaces_the_other(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("minutes: 5\n")
    found = settings_from(file, steps=9)
    assert (found.steps, found.minutes) == (9, None)


def test_what_is_written_reads_as_the_same(tmp_path: Path) -> None:
    settings = Settings(data=["a b.txt"], minutes=1.5, sample_prompt="ROMEO:\n", dropout=0.2)
    file = tmp_path / "a.yaml"
    file.write_text(settings.to_yaml())
    assert read_yaml(file) == asdict(settings)
    assert settings_from(file) == settings


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_settings(preset: str) -> None:
    assert settings_from(preset=preset, data=["a"], steps=1).layers >= 2


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"batch": 0}, "batch must be a whole number of at least 1, got 0"),
        ({"batch": 1.5}, "batch must be a whole number"),
        ({"dropout": float("nan")}, "dropout must be a number of at least 0"),
        ({"order": "sorted"}, "order must be one of random, shuffled, carried, got 'sorted'"),
        ({"compile": "yes"}, "compile must be true or false"),
        ({"steps": 1, "minutes": 1}, "steps and minutes exclude each other"),
        ({"order": "carried", "gradient_checkpointing": True}, "switch one of them off"),
        ({"learning_rate": 1e-6}, "must not exceed"),
        ({"architecture": "mamba3"}, "architecture must be one of mamba, falcon_mamba, mamba2"),
        ({"head_dim": 64}, "head_dim is for Mamba-2, and the architecture is 'mamba'"),
        ({"architecture": "falcon_mamba", "groups": 1}, "groups is for Mamba-2"),
        ({"architecture": "mamba2", "hidden_size": 16}, "head_dim=64 must divide expand"),
        ({"architecture": "mamba2", "groups": 3}, "groups=3 must divide the 4 heads"),
        ({"seed": 2**32}, "seed must be a whole number of at least 0 and at most 4294967295"),
        ({"threads": 100_000}, "threads must be a whole number of at least 1 and at most 1024"),
        ({"data": [""]}, "data must be a name or a list of names"),
        ({"data": ["a", 3]}, "data must be a name or a list of names"),
    ],
)
def test_wrong_values_are_named(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Settings(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("layrs: 3", "no setting 'layrs'; did you mean 'layers'"),
        ("- 3", "must name settings"),
        ("a: [", "is not YAML"),
        ("a: " + "[" * 3000, "nested too deep"),
    ],
)
def test_wrong_files_are_named(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_yaml(file)


@pytest.mark.parametrize("named", ["[tiny]", "3", "''", "nope"])
def test_wrong_presets_are_named(named: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(f"preset: {named}\n")
    with pytest.raises(ConfigError, match=r"there is no preset .*; there are tiny"):
        settings_from(file)


def test_the_rate_rises_then_falls_to_the_last() -> None:
    settings = Settings(learning_rate=1e-2, final_learning_rate=1e-4, warm_up=0.1)
    rates = [rate_at(settings, share / 1000) for share in range(1001)]
    top = rates.index(max(rates))
    assert top == 100
    assert rates[top] == pytest.approx(1e-2)
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] == pytest.approx(1e-4)
