"""Each script in a smoke run: it prints tables, writes JSON, and names whatever it leaves out."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks.conftest import FOLDER, load
from tests.support import processes

pytestmark = pytest.mark.slow

TOOLS = ("chart", "report", "gguf_export")
SCRIPTS = sorted({script.stem for script in FOLDER.glob("*.py")} - {*TOOLS})
NUMBERS = ("ms", "bytes", "reading", "peak_megabytes", "value", "all")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs a script in this process: exit status, standard output, standard error."""
    threads = torch.get_num_threads()

    def run_it(script: str, *arguments: str) -> tuple[int, str, str]:
        module = load(script)
        if script == "memory":  # what processes of their own are for is tested by itself below
            monkeypatch.setattr(module, "in_a_process", module.measure)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
        try:
            status = module.main() or 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, *capsys.readouterr()

    yield run_it
    torch.set_num_threads(threads)


def smoke(run: Run, script: str, folder: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    """What a smoke run printed, and what it wrote."""
    common = ("--quick", "--threads", "1", "--rounds", "1", "--output", str(folder))
    status, printed, error = run(script, *common, *arguments)
    assert status == 0, error
    return printed, json.loads((folder / f"{script}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "gpu_instructions"])
def test_a_smoke_run_prints_and_writes(script: str, run: Run, tmp_path: Path) -> None:
    if script == "arm_instructions":
        cross_build_tools()
    printed, written = smoke(run, script, tmp_path)
    assert written["benchmark"] == script
    assert written["quick"] is True
    assert written["machine"]["threads"] == 1
    assert written["machine"]["read_gb_per_second"] > 0
    for table in written["tables"]:
        assert table["title"] in printed
        assert len(table["rows"]) > 1
        for row in table["rows"]:
            assert row["name"] in printed
            assert any(row.get(key) is not None for key in NUMBERS) or row.get("note"), row


def cross_build_tools() -> None:
    """Skip a test where the tools are missing that compile for Arm and run it."""
    for tool, package in load("arm_instructions").PACKAGES.items():
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is missing: apt-get install {package}")


def test_instructions_of_a_gpu_are_counted(tmp_path: Path) -> None:
    """In a process of its own, where Triton's kernels are compiled and not interpreted."""
    pytest.importorskip("triton", reason="needs Triton: pip install triton")
    arguments = [FOLDER / "gpu_instructions.py", "--quick", "--output", tmp_path]
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "gpu_instructions.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in written["tables"][0]["rows"]}
    assert set(rows) == {
        name for loops in load("gpu_instructions").LOOPS.values() for name in loops
    }
    for row in rows.values():
        # About one exponential for a state and step, and no spilled register in the loop.
        assert 1 <= row["exponentials"] < 1.1
        assert row["spills"] == 0
        assert row["all"] >= row["minimum"]
    # What a thread's registers hold is not exchanged, but for the sums over channels.
    assert rows["scan_kernel"]["exchanges"] == 0


def test_interpreted_kernels_are_not_counted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    status, printed, error = run("gpu_instructions")
    assert (status, printed) == (2, "")
    assert error.startswith("not counted: TRITON_INTERPRET is set")


def test_a_missing_gpu_is_named(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(load("gpu"), "is_available", lambda _: False)
    status, printed, error = run("gpu", "--quick", "--output", str(tmp_path))
    assert (status, printed) == (2, "")
    assert "gpu.py: needs a GPU that PyTorch can use" in error
    assert not list(tmp_path.iterdir())


def test_missing_tools_are_named(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    status, printed, error = run("arm_instructions", "--quick", "--output", str(tmp_path))
    assert status == 2
    assert not printed
    assert error.splitlines() == [
        "not counted, tools are missing: apt-get install g++-aarch64-linux-gnu qemu-user"
    ]


def test_instructions_are_counted_by_their_bits() -> None:
    """Some that an assembler made of the names here."""
    kinds_of = load("arm_instructions").kinds_of
    assert kinds_of("4e829420", "sdot v0.4s, v1.16b, v2.16b") == ["dot"]
    assert kinds_of("4e82ac20", ".byte 0x20, 0xac, 0x82, 0x4e") == ["dot"]  # usmmla
    assert kinds_of("ad400440", "ldp q0, q1, [x2]") == ["load", "load"]
    assert kinds_of("4e22cc20", "fmla v0.4s, v1.4s, v2.4s") == ["fma"]
    assert kinds_of("8b020020", "add x0, x1, x2") == []


def test_peers_left_out_are_named(run: Run, tmp_path: Path) -> None:
    printed, written = smoke(run, "prefill", tmp_path, "--no-peers")
    notes = {row["name"]: row["note"] for row in written["tables"][0]["rows"]}
    for peer in ("Transformers", "mamba.py", "minimal.py", "llama.cpp f32", "llama.cpp f16"):
        assert notes[peer] == "not measured: --no-peers"
        assert peer in printed


@pytest.mark.parametrize("script", [*SCRIPTS, *TOOLS])
def test_help_shows_an_example(script: str, run: Run) -> None:
    status, printed, _ = run(script, "--help")
    assert status == 0
    assert f"example: python benchmarks/{script}.py" in " ".join(printed.split())


def test_a_script_runs_alone_and_memory_is_measured_in_processes(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "memory.py"), "--quick", "--threads", "1"]
    only = ["--only", "generate, max_new_tokens=1", "512"]
    done = processes.run(*command, *only)
    assert done.returncode == 0, done.stderr
    assert 0 <= int(done.stdout) < 1 << 30

    memory = load("memory")
    options = memory.options_from(memory.parser("memory", "").parse_args(["--quick"]))
    with pytest.raises(SystemExit, match="measuring 'nonsense' at 8 tokens failed: KeyError"):
        memory.in_a_process("nonsense", 8, options)


def test_results_become_a_chart_and_a_report(run: Run, tmp_path: Path) -> None:
    smoke(run, "train", tmp_path, "--no-peers")
    status, _, error = run("chart", "--results", str(tmp_path))
    if find_spec("matplotlib") is None:
        assert status == 1
        assert error.strip() == "matplotlib is not installed: pip install 'anymamba[peers]'"
    else:
        assert status == 0, error
        assert "<svg" in (tmp_path / "overview.svg").read_text(encoding="utf-8")

    readme = tmp_path / "README.md"
    shutil.copy(FOLDER / "README.md", readme)
    for _ in range(2):  # the second time replaces what the first one wrote
        status, _, error = run("report", "--results", str(tmp_path), "--readme", str(readme))
        assert status == 0, error
    text = readme.read_text(encoding="utf-8")
    assert text.count("| limit: 3 x the forward products at the peak") == 2
    assert "Not measured yet: `python benchmarks/prefill.py`" in text


def test_nothing_to_draw_is_said(run: Run, tmp_path: Path) -> None:
    if find_spec("matplotlib") is None:
        pytest.skip("without matplotlib that is said first")
    status, _, error = run("chart", "--results", str(tmp_path))
    assert status == 1
    assert "run make bench first" in error
