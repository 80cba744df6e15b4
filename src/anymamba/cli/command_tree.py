"""All commands and what each takes, read from their argument parsers."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from anymamba.cli.main import COMMANDS, build_parser

_FILES = ("FILE", "FOLDER", "MODEL", "DATA", "DST", "SRC DST")


@dataclass(frozen=True)
class Option:
    """An option, or with no names an argument that stands for itself.

    Args:
        names: as they are typed, such as `--model`.
        help: what it does, in a line.
        takes_value: whether a value follows.
        choices: the values that it may have; empty where they are not a list.
        takes_file: whether the value is a file's or folder's name.
        repeats: whether it may be given several times.
    """

    names: tuple[str, ...]
    help: str
    takes_value: bool
    choices: tuple[str, ...]
    takes_file: bool
    repeats: bool


@dataclass(frozen=True)
class Command:
    """A command, its summary, its options and its other arguments."""

    name: str
    summary: str
    options: tuple[Option, ...]
    arguments: tuple[Option, ...]


def command_tree() -> list[Command]:
    """Every command. Imports all of their modules, which no other command does."""
    top = build_parser(COMMANDS)
    (branches,) = (action.choices for action in top._actions if isinstance(action.choices, dict))
    return [Command(name, COMMANDS[name], *options_of(parser)) for name, parser in branches.items()]


def options_of(parser: argparse.ArgumentParser) -> tuple[tuple[Option, ...], tuple[Option, ...]]:
    """A command's options, and its other arguments."""
    found = [as_option(action) for action in parser._actions]
    named = tuple(option for option in found if option.names)
    return named, tuple(option for option in found if not option.names)


def as_option(action: argparse.Action) -> Option:
    """What argparse knows about one option."""
    return Option(
        names=tuple(action.option_strings),
        help=(action.help or "").replace("%%", "%"),
        takes_value=action.nargs != 0,
        choices=tuple(map(str, action.choices or ())),
        takes_file=action.metavar in _FILES,
        repeats=isinstance(action, argparse._AppendAction),
    )
