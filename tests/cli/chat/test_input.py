"""What is typed in a chat."""

import errno
import sys

import pytest

from anymamba.cli.chat.input import line_reader, messages, read_typed_line, remember
from anymamba.errors import InputError


def messages_in(text):
    """The messages in what is typed, and the prompts that were shown."""
    lines = iter(text.splitlines())
    prompts = []

    def read_line(prompt):
        prompts.append(prompt)
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    return list(messages(read_line)), prompts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one\ntwo", ["one", "two"]),
        ("one\n\n  \ntwo", ["one", "two"]),
        ("one\\\ntwo\\\nthree\nfour", ["one\ntwo\nthree", "four"]),
        ("one\\", ["one"]),
        ('"""one\n\ntwo\n"""\nthree', ["one\n\ntwo\n", "three"]),
        ('"""one"""\ntwo', ["one", "two"]),
        ('"""one\n\\\ntwo"""', ["one\n\\\ntwo"]),
        ('"""never ended\n', ["never ended"]),
        ('"""', []),
        ('say """this"""', ['say """this"""']),
        ("  indented", ["  indented"]),
        ("", []),
    ],
)
def test_messages(text, expected):
    assert messages_in(text)[0] == expected


def test_a_message_that_goes_on_has_another_prompt():
    assert messages_in("one\\\ntwo\nthree")[1] == ["> ", "... ", "> ", "> "]


def test_lines_of_a_pipe(typed):
    data = "déjà\r\nvu".encode()
    typed(data)
    assert list(messages(line_reader(None))) == ["déjà", "vu"]


def test_lines_that_are_no_text(typed):
    typed(b"\xff\n")
    with pytest.raises(InputError, match="UTF-8"):
        list(messages(line_reader(None)))


def test_without_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="standard input"):
        line_reader(None)


def test_a_history_that_finds_no_space_is_one_line(tmp_path, monkeypatch, capsys):
    class Full:
        def set_history_length(self, length):
            pass

        def read_history_file(self, path):
            pass

        def write_history_file(self, path):
            raise OSError(errno.ENOSPC, "No space left on device")

    at_the_end = []
    monkeypatch.setattr("atexit.register", at_the_end.append)
    name = str(tmp_path / "lines")
    remember(Full(), name)
    at_the_end[0]()
    expected = f"anymamba: the history could not be kept in {name!r}: No space left on device\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("strict", [True, False])
def test_bytes_typed_in_a_terminal_that_are_no_text(strict, monkeypatch):
    """Python reads them as an error, or in some settings as halves of surrogate pairs."""

    def typed(prompt):
        return b"\xff".decode("utf-8", errors="strict" if strict else "surrogateescape")

    monkeypatch.setattr("builtins.input", typed)
    with pytest.raises(InputError, match="not UTF-8"):
        read_typed_line("> ")
