"""`anymamba generate` as a process of its own: text comes while it is made, and ends cleanly."""

import io
import os
import signal
import subprocess
import sys

import pytest

from anymamba.cli.terminal.output import write
from tests.support.cli import buffered

# Far more than a test waits for.
ENDLESS = ("--max-new-tokens", "1000000")


@pytest.fixture
def endless(tiny):
    """Starts a generation without end; ends it if the test does not."""
    started = []

    def start(*options):
        command = [sys.executable, "-m", "anymamba", "generate", "a", "--model", str(tiny)]
        process = subprocess.Popen(
            [*command, *ENDLESS, *options],
            env=buffered(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # A shell starts its background jobs deaf to Ctrl-C, and they hand that on.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_each_piece_leaves_the_program_at_once(monkeypatch):
    outside = io.BytesIO()
    monkeypatch.setattr(
        sys, "stdout", io.TextIOWrapper(io.BufferedWriter(outside), encoding="utf-8")
    )
    write("piece")
    assert outside.getvalue() == b"piece"


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_text_comes_while_it_is_made_and_ctrl_c_ends_it(endless):
    process = endless()
    # Were the text shown at its end, this would wait for hours.
    assert process.stdout.read(10)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == b""
    assert out.endswith(b"\n")


def test_a_reader_that_leaves_ends_it(endless):
    process = endless()
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == b""


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_ctrl_c_leaves_no_half_object(endless):
    process = endless("--json")
    # Nothing shows how far it is; the interrupt is as quiet during the imports as after them.
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=4)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", b"")
