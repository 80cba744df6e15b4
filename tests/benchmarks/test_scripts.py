"""Each script in a smoke run: it prints tables, writes JSON, and names whatever it leaves out."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.conftest import FOLDER

SCRIPTS = ("prefill", "decode", "train", "scan", "memory")
NUMBERS = ("ms", "bytes")


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(FOLDER / f"{script}.py"), *arguments], capture_output=True, text=True
    )


def smoke(script: str, folder: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    """What a smoke run printed, and what it wrote."""
    common = ("--quick", "--threads", "1", "--rounds", "1", "--output", str(folder))
    done = run(script, *common, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / f"{script}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_smoke_run_prints_and_writes(script: str, tmp_path: Path) -> None:
    printed, written = smoke(script, tmp_path)
    assert written["benchmark"] == script
    assert written["quick"] is True
    assert written["machine"]["threads"] == 1
    assert written["machine"]["read_gb_per_second"] > 0
    for table in written["tables"]:
        assert table["title"] in printed
        assert len(table["rows"]) > 1
        for row in table["rows"]:
            assert row["name"] in printed
            assert any(row.get(key) is not None for key in NUMBERS) or row["note"], row


def test_peers_left_out_are_named(tmp_path: Path) -> None:
    printed, written = smoke("prefill", tmp_path, "--no-peers")
    notes = {row["name"]: row["note"] for row in written["tables"][0]["rows"]}
    for peer in ("Transformers", "mamba.py", "minimal.py", "llama.cpp f32", "llama.cpp f16"):
        assert notes[peer] == "not measured: --no-peers"
        assert peer in printed


@pytest.mark.parametrize("script", [*SCRIPTS, "chart", "report", "gguf_export"])
def test_help_shows_an_example(script: str) -> None:
    done = run(script, "--help")
    assert done.returncode == 0
    assert f"example: python benchmarks/{script}.py" in " ".join(done.stdout.split())


def test_results_become_a_chart_and_a_report(tmp_path: Path) -> None:
    smoke("train", tmp_path, "--no-peers")
    done = run("chart", "--results", str(tmp_path))
    if find_spec("matplotlib") is None:
        assert done.returncode == 1
        assert done.stderr.strip() == ("matplotlib is not installed: pip install 'anymamba[peers]'")
    else:
        assert done.returncode == 0, done.stderr
        assert "<svg" in (tmp_path / "overview.svg").read_text(encoding="utf-8")

    readme = tmp_path / "README.md"
    shutil.copy(FOLDER / "README.md", readme)
    for _ in range(2):  # the second time replaces what the first one wrote
        done = run("report", "--results", str(tmp_path), "--readme", str(readme))
        assert done.returncode == 0, done.stderr
    text = readme.read_text(encoding="utf-8")
    assert text.count("| limit: 3 x the forward products") == 2
    assert "Not measured yet: `python benchmarks/prefill.py`" in text


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    if find_spec("matplotlib") is None:
        pytest.skip("without matplotlib that is said first")
    done = run("chart", "--results", str(tmp_path))
    assert done.returncode == 1
    assert "run make bench first" in done.stderr
