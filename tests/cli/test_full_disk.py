"""Every command that writes, where the system takes no more: one line, and nothing half-written."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from anymamba.assets import bundled_model
from tests.support import processes

resource = pytest.importorskip("resource")


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """What a full disk does to whoever writes more, with another number of error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


WRITING = {
    "quantize": ("quantize", "MODEL", "OUT", "--group", "32"),
    "convert": ("convert", "MODEL", "OUT", "--layout", "original"),
    "convert to GGUF": ("convert", "BUNDLED", "OUT.gguf"),
    "generate": (
        "generate",
        "a",
        "--model",
        "MODEL",
        "--save-state",
        "OUT",
        "--max-new-tokens",
        "2",
    ),
    "ingest": ("ingest", "TEXT", "--model", "MODEL", "--save-state", "OUT"),
}


@pytest.mark.parametrize("way", WRITING)
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("size", [800, 3000])
def test_nothing_is_half_written(
    way: str, before: bool, size: int, tiny: Path, tmp_path: Path, anymamba: Any
) -> None:
    if way == "convert to GGUF":
        pytest.importorskip("gguf")
    text, place = tmp_path / "text.txt", tmp_path / "place"
    text.write_text("To be, or not to be")
    place.mkdir()
    out = place / "out"
    names = {"MODEL": tiny, "BUNDLED": bundled_model(), "TEXT": text, "OUT": out}
    names["OUT.gguf"] = place / "out.gguf"
    command = [names.get(word, word) for word in WRITING[way]]
    replace = ["--overwrite"] if way.startswith(("quantize", "convert")) else []
    if before:
        assert anymamba(*command).status == 0
    old = everything_in(place)
    assert bool(old) == before
    with files_of_at_most(size):
        done = anymamba(*command, *(replace if before else ()))
    assert done.status == 2
    assert done.err.splitlines()[-1].startswith(f"anymamba: cannot write '{place}")
    assert done.err.splitlines()[-1].endswith("choose a place that takes files of this size")
    assert "Traceback" not in done.err
    assert everything_in(place) == old
    assert not list(place.glob(".*"))
    assert anymamba(*command, *(replace if before else ())).status == 0


def test_a_chat_that_cannot_save_says_so(tiny: Path, tmp_path: Path) -> None:
    program = (
        "import resource, sys; from anymamba.cli.main import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500)); sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "chat", "--model", str(tiny), "--max-new-tokens", "2"]
    typed = f"a\n/save {tmp_path}/a.state\n"
    done = processes.run(*command, input=typed)
    assert done.returncode == 2
    assert f"anymamba: cannot write '{tmp_path}/a.state': " in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [("generate", "a"), ("ingest", "TEXT")])
def test_a_folder_without_permission_is_found_before_the_work(
    command: tuple[str, str],
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    anymamba: Any,
) -> None:
    (tmp_path / "text.txt").write_text("a")
    command = tuple(str(tmp_path / "text.txt") if part == "TEXT" else part for part in command)  # type: ignore[assignment]
    # The superuser, who runs tests in containers, may write anywhere.
    monkeypatch.setattr("os.access", lambda place, mode: str(place) != str(tmp_path))
    monkeypatch.setattr("anymamba.runtime.loading.load", lambda *_, **__: pytest.fail("loaded"))
    complaint = anymamba(*command, "--model", tiny, "--save-state", tmp_path / "a.state").complaint
    assert "you may not write to the folder" in complaint


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_device_is_not_replaced_by_a_state(tiny: Path, tmp_path: Path, anymamba: Any) -> None:
    os.mkfifo(tmp_path / "pipe")
    done = anymamba("generate", "a", "--model", tiny, "--save-state", tmp_path / "pipe")
    assert "it is not a file" in done.complaint
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("way", ["quantize", "convert"])
def test_folders_say_what_to_do(
    way: str,
    number: int,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    anymamba: Any,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    full = number in (errno.ENOSPC, errno.EDQUOT)
    monkeypatch.setattr("os.fsync" if full else "tempfile.mkdtemp", fail)
    done = anymamba(way, tiny, tmp_path / "out")
    assert done.status == 2
    advice = "free some space" if full else "choose a place that you may write to"
    assert advice in done.err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("command", [("models",), ("score", "TEXT"), ("completion", "bash")])
def test_output_that_finds_no_space_is_one_line(command: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("To be, or not to be")
    command = tuple(str(tmp_path / "text.txt") if part == "TEXT" else part for part in command)
    program = (
        "import resource, sys; from anymamba.cli.main import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10)); sys.exit(main(sys.argv[1:]))"
    )
    with (tmp_path / "out.txt").open("w") as out:
        done = subprocess.run(
            [sys.executable, "-c", program, *command],
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr == "anymamba: cannot write the output: File too large; free some space\n"
