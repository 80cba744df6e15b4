"""All that needs no PyTorch works where macOS or Windows lack what Linux has.

Python of these systems is not to be had here, so their lacks stand in for them: `other_system`.
What comes out is compared with what comes out on this system as it is.
"""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.support import processes
from tests.systems.other_system import LACKS, SITE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="stands in for other systems")

ROOT = Path(__file__).parents[2]
# A locale whose encoding is ASCII: who does not say which encoding is meant fails sooner than with
# the code page 1252 of Windows.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture(params=["windows"])
def system(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


# What macOS lacks, Windows lacks as well, so that one of them is enough where time counts.
both_systems = pytest.mark.parametrize("system", LACKS, indirect=True)


@pytest.fixture
def environment(system: str, tmp_path: Path) -> dict[str, str]:
    """In which Python, and each Python that it starts, is as on that system."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE.format(system=system), encoding="utf-8")
    usual = {name: value for name, value in os.environ.items() if name != "PYTHONIOENCODING"}
    return usual | ASCII | {"PYTHONPATH": f"{site}{os.pathsep}{ROOT}"}


@both_systems
def test_what_is_hidden_is_hidden(system: str, environment: dict[str, str]) -> None:
    program = """
import io, os, sys
def outcome(program, name):
    try: exec(program, {"__name__": name})
    except Exception as error: return type(error).__name__
for program in (
    "import fcntl",
    "import resource",
    "import os; os.fork",
    "import os; os.getpid",
    "from os import sched_getaffinity",
    "import signal; signal.SIGKILL",
    "import signal; signal.SIGTERM",
    "open('/proc/self/status')",
):
    print(outcome(program, "anymamba.probe"), outcome(program, "another"))
"""
    done = processes.python("-c", program, env=environment, check=True)
    missing = {
        "macos": ["None"] * 4 + ["ImportError", "None", "None", "FileNotFoundError"],
        "windows": ["ModuleNotFoundError"] * 2
        + ["AttributeError", "None", "ImportError", "AttributeError", "None", "FileNotFoundError"],
    }
    both = [line.split() for line in done.stdout.splitlines()]
    assert [ours for ours, _ in both] == missing[system]
    assert [others for _, others in both] == ["None"] * 7 + ["FileNotFoundError"]


@both_systems
def test_the_library(system: str, environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    locks = "locks" if system == "windows" else "free"
    uses = ("-m", "tests.systems.uses")
    here = processes.python(*uses, tmp_path / "here", "free", cwd=ROOT)
    there = processes.python(*uses, tmp_path / "there", locks, cwd=ROOT, env=environment)
    assert (here.returncode, here.stderr) == (0, "")
    assert (there.returncode, there.stderr) == (0, "")
    assert there.stdout == here.stdout


TEXT = "Où est le serpent ? \N{SNAKE} To be, or not to be.\n" * 3
COMMANDS = (
    ("", "generate", "ROMEO:", "--max-new-tokens", "12", "--temperature", "0"),
    (TEXT, "generate", "--max-new-tokens", "3", "--temperature", "0", "--save-state", "a.state"),
    ("", "generate", "\n", "--max-new-tokens", "3", "--temperature", "0", "--state", "a.state"),
    (TEXT, "ingest", "-", "--state", "a.state", "--save-state", "a.state"),
    ("", "info", "a.state"),
    ("Hi there\n/save b.state\n/load b.state\n", "chat", "--max-new-tokens", "5", "--seed", "1"),
    (TEXT, "score", "-"),
    ("", "inspect", "To be"),
    ("", "quantize", "{model}", "int4", "--weights", "int4"),
    ("", "generate", "ROMEO:", "-m", "int4", "--max-new-tokens", "12", "--temperature", "0"),
    ("", "convert", "{model}", "model.gguf"),
    ("", "convert", "model.gguf", "back"),
    ("", "convert", "{model}", "back", "--layout", "original", "--overwrite"),
    ("", "generate", "ROMEO:", "-m", "back", "--max-new-tokens", "12", "--temperature", "0"),
    ("", "info", "{model}"),
    ("", "models"),
    ("", "completion", "bash"),
    ("", "run", "program.py"),
)
# Times, speeds and sizes of memory.
MEASURED = re.compile(r"[\d.,]+ (tokens/s|s|MB|seconds)\b")


@pytest.mark.slow
def test_the_command_line(environment: dict[str, str], tmp_path: Path) -> None:
    """Each command in a process of its own: the same output, the same files."""
    model = json.loads(processes.python("-m", "anymamba", "info", "--json").stdout)["bundled_model"]
    found: list[list[Any]] = []
    for name, variables in (("here", dict(os.environ)), ("there", environment)):
        folder = tmp_path / name
        folder.mkdir()
        program = "import causal_conv1d, sys; print(causal_conv1d.__name__, sys.argv)\n"
        (folder / "program.py").write_text(program, encoding="utf-8")
        said = []
        for typed, *words in COMMANDS:
            done = subprocess.run(
                [sys.executable, "-m", "anymamba", *(word.format(model=model) for word in words)],
                cwd=folder,
                env=variables,
                input=typed.encode(),
                capture_output=True,
                check=False,
            )
            assert done.returncode == 0, (words, done.stderr.decode(errors="replace"))
            assert b"Traceback" not in done.stderr
            said.append((words, MEASURED.sub("", done.stdout.decode().replace(str(folder), "."))))
        files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*.*")}
        found.append([*said, files])
    for here, there in zip(*found, strict=True):
        assert there == here


@pytest.mark.slow
def test_what_each_wheel_is_tested_with(environment: dict[str, str], tmp_path: Path) -> None:
    """Models, states and `generate`: Python's part of it, with the first instruction set.

    Paths have a backslash, as on Windows, where a message that shows their repr doubles it.
    """
    folder = tmp_path / "back\\slash"
    folder.mkdir()
    listed = (ROOT / "tests" / "without_torch.txt").read_text(encoding="utf-8").split()
    tests = [name for name in listed if not name.startswith("tests/native/")]
    assert "tests/cli/commands/text/test_generate.py" in tests
    done = processes.python(
        *("-m", "pytest", "-m", "not native_isa and not slow", "-p", "no:xdist", *tests),
        cwd=ROOT,
        env=environment | {"PYTEST_DEBUG_TEMPROOT": str(folder)},
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_the_server(environment: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("uvicorn", reason="the server's package: pip install 'anymamba[server]'")
    command = [sys.executable, "-m", "anymamba", "serve", "--port", "0", "--cache-dir", "cache"]
    with subprocess.Popen(
        command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True
    ) as program:
        assert program.stderr is not None
        try:
            line = program.stderr.readline()
            assert "is served at http://127.0.0.1:" in line, line + program.stderr.read()
            address = line.split(" at ")[1].split(";")[0]
            body = {"prompt": "ROMEO:", "max_tokens": 12, "temperature": 0}
            answer = json.loads(post(f"{address}/completions", json.dumps(body).encode()))
            assert answer["usage"]["completion_tokens"] == 12
            made = json.loads(post(f"{address}/states", json.dumps({"input": "ROMEO:"}).encode()))
            with urllib.request.urlopen(f"{address}/states/{made['id']}/file") as download:
                file = download.read()
            octets = "application/octet-stream"
            sent = json.loads(post(f"{address}/states/file", file, octets))
            assert sent["tokens"] == made["tokens"]
            with pytest.raises(urllib.error.HTTPError) as caught:
                post(f"{address}/states/file", file[:-8], octets)
            assert caught.value.code == 400
            assert "truncated" in caught.value.read().decode()
        finally:
            program.terminate()
        assert program.wait(30) in (0, -signal.SIGTERM)


def post(address: str, body: bytes, kind: str = "application/json") -> bytes:
    request = urllib.request.Request(address, body, {"Content-Type": kind})
    with urllib.request.urlopen(request, timeout=60) as answer:
        data: bytes = answer.read()
        return data


@pytest.mark.slow
def test_training(environment: dict[str, str], tmp_path: Path) -> None:
    """Which needs PyTorch: a run that ends, one that goes on, and a generation from its model."""
    (tmp_path / "text.txt").write_text("To be, or not to be. Où ? " * 200, encoding="utf-8")
    sizes = ("--layers", "1", "--hidden-size", "16", "--window", "32", "--batch", "2")
    data = ("--data", "text.txt", "--output", "run", "--save-every", "2", *sizes)
    on = ("train", "--output", "run", "--resume", "--steps", "6")
    write = ("generate", "To", "-m", "run", "--max-new-tokens", "3")
    for words in (("train", *data, "--steps", "4"), on, write):
        done = processes.python("-m", "anymamba", *words, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob(".partial*"))
