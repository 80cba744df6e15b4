"""`anymamba info`: describe a model on disk, or what this machine offers."""

from __future__ import annotations

import argparse
import json

from anymamba.cli.quiet import quiet

__all__ = ["add_arguments", "run"]

DESCRIPTION = """\
With MODEL, describe a model: what it is built of, how large it and its state are, and its files.
No weights are loaded, and PyTorch is not needed. Without MODEL, describe this installation.
"""
EXAMPLES = """\
examples:
  anymamba info
  anymamba info ./my-model
  anymamba info state-spaces/mamba-130m-hf --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `anymamba info`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a folder, or a name on the hub")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> None:
    """Describe, and print."""
    from anymamba.cli import about_machine, about_model

    with quiet():
        if arguments.model is None:
            facts, text = about_machine.describe(), about_machine.as_text
        else:
            facts, text = about_model.describe(arguments.model), about_model.as_text
    print(json.dumps(facts) if arguments.json else text(facts))
