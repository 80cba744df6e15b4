"""The `anymamba` command: finds the command that was asked for, and says what went wrong.

Each command is a module of this package with two functions, `add_arguments(parser)` and
`run(arguments)`. Only the chosen one is imported, and none imports torch before it must, because
a person waits for each of these imports.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from anymamba import __version__
from anymamba.errors import AnyMambaError, InputError

COMMANDS = {
    "generate": "continue a text with a model",
    "info": "describe a model, or this machine",
}

EXIT_FAILURE = 2
# What a shell reports for programs ended by the signals SIGINT and SIGPIPE.
EXIT_INTERRUPTED = 130
EXIT_CLOSED_PIPE = 141


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are errors like all others: one line each."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    0: done. 2: a mistake, named in one line on standard error. 130: interrupted by Ctrl-C.
    141: whoever read the output stopped reading.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that lacks a character shows a question mark, which is better than ending.
        sys.stdout.reconfigure(errors="replace")
    try:
        run_command(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except AnyMambaError as error:
        print("anymamba: " + " ".join(str(error).split()), file=sys.stderr)
        return EXIT_FAILURE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        forget_output()
        return EXIT_CLOSED_PIPE
    return 0


def run_command(argv: Sequence[str]) -> None:
    """Parse the arguments and call the command that they name."""
    top = Parser(
        prog="anymamba",
        description="Mamba language models on any machine.",
        epilog='example: anymamba generate "ROMEO:" --max-new-tokens 300',
    )
    top.add_argument("--version", action="version", version=f"anymamba {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        parser = commands.add_parser(
            name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        # Loading the module of a command that nobody asked for would only cost time.
        if name in argv:
            import_module(f"anymamba.cli.{name}").add_arguments(parser)
    arguments = top.parse_args(argv)
    import_module(f"anymamba.cli.{arguments.command}").run(arguments)


def forget_output() -> None:
    """Send what is still to be flushed nowhere: Python would complain about it on its way out."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
