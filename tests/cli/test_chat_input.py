"""What is typed in a chat."""

from __future__ import annotations

import io
import sys

import pytest

from anymamba.cli.chat_input import line_reader, messages
from anymamba.errors import InputError


def typed(text):
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
    assert typed(text)[0] == expected


def test_a_message_that_goes_on_has_another_prompt():
    assert typed("one\\\ntwo\nthree")[1] == ["> ", "... ", "> ", "> "]


def test_lines_of_a_pipe(monkeypatch):
    data = "déjà\r\nvu".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert list(messages(line_reader(None))) == ["déjà", "vu"]


def test_lines_that_are_no_text(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n")))
    with pytest.raises(InputError, match="UTF-8"):
        list(messages(line_reader(None)))


def test_without_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="standard input"):
        line_reader(None)
