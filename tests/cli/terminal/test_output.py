"""Output and remarks that nobody takes."""

import errno
import io
import os
import subprocess
import sys

import pytest

from anymamba.cli.terminal import progress
from anymamba.cli.terminal.output import json_line
from anymamba.cli.terminal.progress import Progress
from tests.support import processes


class Full(io.StringIO):
    """A stream on a disk without space."""

    def write(self, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_work_is_not_lost_if_nobody_hears_how_it_went(tiny, tmp_path, monkeypatch, anymamba):
    (tmp_path / "a.txt").write_text("To be")
    monkeypatch.setattr(sys, "stderr", Full())
    state = tmp_path / "a.state"
    done = anymamba("ingest", tmp_path / "a.txt", "--save-state", state, "--model", tiny)
    assert (done.status, done.out) == (0, "")
    assert state.is_file()
    done = anymamba("generate", "a", "--model", tiny, "--max-new-tokens", 2)
    assert done.status == 0
    assert anymamba("info", "./nowhere").status == 2


def test_progress_that_nobody_sees(monkeypatch):
    moments = iter(range(100))
    monkeypatch.setattr(progress.time, "monotonic", lambda: 100.0 * next(moments))
    with Progress(100, Full()) as shown:
        shown.show(10, 10)
        shown.show(20, 20)


def run(redirection, *words):
    return processes.run(
        "sh", "-c", f'exec "$0" -m anymamba "$@" {redirection}', sys.executable, *words
    )


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="the shell is POSIX's")
@pytest.mark.parametrize("command", [("models",), ("generate", "a", "--max-new-tokens", "2")])
def test_a_closed_output_is_as_one_to_nowhere(command):
    closed, nowhere = run(">&-", *command), run(">/dev/null", *command)
    assert closed.returncode == nowhere.returncode == 0
    assert "Traceback" not in closed.stderr
    assert len(closed.stderr.splitlines()) == len(nowhere.stderr.splitlines())


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="the shell is POSIX's")
def test_figures_never_stand_among_the_output():
    words = ("generate", "a", "--max-new-tokens", "5", "--temperature", "0")
    closed, open_ = run("2>&-", *words), run("", *words)
    assert (closed.returncode, closed.stdout) == (0, open_.stdout)
    assert run("2>&-", "info", "./nowhere").stdout == ""


@pytest.mark.skipif(os.name != "posix", reason="pipes like that are POSIX's")
def test_a_reader_of_remarks_that_is_gone():
    reading_end, writing_end = os.pipe()
    os.close(reading_end)
    command = [sys.executable, "-m", "anymamba", "generate", "a", "--max-new-tokens", "2"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=writing_end, check=False)
    os.close(writing_end)
    assert done.returncode == 0
    assert done.stdout


def test_json_has_null_for_what_is_no_number():
    facts = {"loss": float("nan"), "curve": [1.5, float("inf")], "parts": {"a": -float("inf")}}
    assert json_line(facts) == '{"loss": null, "curve": [1.5, null], "parts": {"a": null}}'
