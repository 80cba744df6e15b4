"""Numbers on the command line."""

import argparse

import pytest

from anymamba.cli.options.argument_types import integer, number


@pytest.mark.parametrize(("text", "value"), [("1", 1), ("30", 30), (" 7 ", 7)])
def test_integers(text, value):
    assert integer(1)(text) == value


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "one", "", "99"])
def test_refused_integers(text):
    with pytest.raises(argparse.ArgumentTypeError, match=text or "''"):
        integer(1, 50)(text)


@pytest.mark.parametrize(("text", "value"), [("0", 0.0), ("1", 1.0), ("5e-1", 0.5)])
def test_numbers(text, value):
    assert number(0, 1)(text) == value


@pytest.mark.parametrize("text", ["-0.1", "1.01", "nan", "inf", "-inf", "half", ""])
def test_refused_numbers(text):
    with pytest.raises(argparse.ArgumentTypeError, match=text or "''"):
        number(0, 1)(text)


def test_a_border_can_be_left_out():
    assert number(0, above_low=True)("1e-9") == 1e-9
    with pytest.raises(argparse.ArgumentTypeError, match="above 0"):
        number(0, above_low=True)("0")


def test_infinity_is_refused_where_there_is_no_upper_end():
    with pytest.raises(argparse.ArgumentTypeError, match="inf"):
        number(0)("inf")
