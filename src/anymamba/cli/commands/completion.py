"""`anymamba completion`: a script that lets a shell complete commands, options and values."""

from __future__ import annotations

import argparse
import json

__all__ = ["add_arguments", "run"]

DESCRIPTION = """\
Print a script that lets a shell complete commands, options, their values and file names. It is
made from the commands as they are in this version.
"""
EXAMPLES = """\
examples:
  anymamba completion bash > ~/.local/share/bash-completion/completions/anymamba
  anymamba completion zsh > ~/.zfunc/_anymamba
  anymamba completion fish > ~/.config/fish/completions/anymamba.fish
"""
SHELLS = ("bash", "zsh", "fish")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `anymamba completion`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help="bash, zsh or fish")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> None:
    """Print the script."""
    from anymamba.cli.completion_scripts import SCRIPTS

    script = SCRIPTS[arguments.shell]()
    print(json.dumps({"shell": arguments.shell, "script": script}) if arguments.json else script)
