"""`anymamba info`: describe a model or a state on disk, or what this machine offers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from anymamba.cli.options.model import add_offline_argument
from anymamba.cli.terminal.output import say
from anymamba.cli.terminal.silence import quiet

__all__ = ["add_arguments", "run"]

DESCRIPTION = """\
With MODEL, describe a model: what it is built of, how large it and its state are, and its files.
With the file of a state, tell how much it has read, and of which model it is. No weights are
loaded, and PyTorch is not needed. Without MODEL, describe this installation.
"""
EXAMPLES = """\
examples:
  anymamba info
  anymamba info ./my-model
  anymamba info book.state
  anymamba info state-spaces/mamba-130m-hf --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `anymamba info`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a folder, a GGUF file, a state's file, or a name on the hub",
    )
    add_offline_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> None:
    """Describe, and print."""
    with quiet():
        facts, as_text = describe(arguments.model, arguments.offline)
    say(json.dumps(facts) if arguments.json else as_text(facts))


def describe(
    model: str | None, offline: bool
) -> tuple[dict[str, Any], Callable[[dict[str, Any]], str]]:
    """What there is to say, and how to say it to people."""
    if model is None:
        from anymamba.cli.describe import machine as about_machine

        return about_machine.describe(), about_machine.as_text
    from anymamba.checkpoint.gguf import find_gguf
    from anymamba.checkpoint.io import user_path

    file = user_path(model)
    gguf = find_gguf(file)
    if gguf is not None and gguf.is_file():
        from anymamba.cli.describe import gguf as about_gguf

        return about_gguf.describe(gguf), about_gguf.as_text
    if file.is_file():
        from anymamba.cli.describe import state as about_state

        return about_state.describe(file), about_state.as_text
    from anymamba.cli.describe import model as about_model

    return about_model.describe(model, offline=offline), about_model.as_text
