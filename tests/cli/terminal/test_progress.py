"""The line that says how far a long task is."""

import io

import pytest

from anymamba.cli.terminal import progress as module
from anymamba.cli.terminal.progress import Progress, Steps, clock


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def time_passes(monkeypatch):
    """Each look at the clock finds it a second later."""
    moments = iter(range(1000))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(moments)))


def test_a_terminal_has_a_bar_and_is_left_clean(time_passes):
    out = Terminal()
    with Progress(100, out) as progress:
        progress.show(25, 50)
        assert (
            out.getvalue() == "\r[######..................]  25%, 50 tokens, 50 tokens/s, 0:03 left"
        )
        progress.show(100, 200)
        assert "100%, 200 tokens, 100 tokens/s, 0:00 left" in out.getvalue()
    lines = out.getvalue().split("\r")
    assert lines[-1] == ""
    assert lines[-2].strip() == ""
    # What was drawn is covered in full.
    assert len(lines[-2]) >= max(map(len, lines[1:-2]))


def test_a_file_gets_a_plain_line_now_and_then(time_passes):
    out = io.StringIO()
    with Progress(1000, out) as progress:
        for done in range(1, 26):
            progress.show(done * 40, done)
    lines = out.getvalue().splitlines()
    assert lines == [
        " 40%, 10 tokens, 1 tokens/s, 0:15 left",
        " 80%, 20 tokens, 1 tokens/s, 0:05 left",
    ]


def test_where_nobody_knows_the_size_there_is_no_share(time_passes):
    out = Terminal()
    with Progress(None, out) as progress:
        progress.show(2_500_000, 1200)
    assert "2.5 MB, 1,200 tokens, 1,200 tokens/s" in out.getvalue()
    assert "%" not in out.getvalue()


def test_nothing_is_drawn_where_nothing_is_wanted(time_passes):
    out = Terminal()
    with Progress(100, out, visible=False) as progress:
        progress.show(50, 1)
    assert out.getvalue() == ""


def test_an_error_leaves_the_terminal_clean_too(time_passes):
    out = Terminal()

    def fail():
        with Progress(100, out) as progress:
            progress.show(50, 1)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert out.getvalue().endswith("\r")


def test_steps(time_passes):
    terminal, file = Terminal(), io.StringIO()
    with Steps("tensors", terminal) as steps:
        steps.show(12, 24)
    assert "\r[############............]  50%, 12 of 24 tensors" in terminal.getvalue()
    with Steps("tensors", file) as steps:
        for done in range(25):
            steps.show(done, 24)
    assert file.getvalue().splitlines() == [" 38%, 9 of 24 tensors", " 79%, 19 of 24 tensors"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3600, "1:00:00")]
)
def test_times_are_readable(seconds, text):
    assert clock(seconds) == text
