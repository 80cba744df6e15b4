"""The `anymamba` command: finds the command that was asked for, and says what went wrong.

Each command is a module of `anymamba.cli.commands` with a DESCRIPTION, EXAMPLES, a frozen dataclass
`Options` and a function `run(options)`. Only the chosen one is imported, and none imports what is
slow before it must, because a person waits for each of these imports.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from collections.abc import Collection, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from anymamba import __version__
from anymamba.cli.terminal.output import forget, open_missing, prepare, tell, tell_error
from anymamba.errors import AnyMambaError, InputError

COMMANDS = {
    "generate": "continue a text with a model",
    "chat": "talk with a model, line by line",
    "serve": "serve a model over HTTP, as OpenAI does",
    "ingest": "read texts of any length into a state file",
    "models": "list models on the hub to begin with",
    "download": "fetch a model from the hub",
    "info": "describe a model, a state, or this machine",
    "score": "tell how well a model predicts a text",
    "inspect": "show what selection does with a text",
    "lambada": "test a model on the last words of passages",
    "evaluate": "test a model with lm-evaluation-harness",
    "bench": "measure how fast a model runs here",
    "run": "run a program that imports mamba_ssm or causal_conv1d",
    "train": "train a model on texts",
    "finetune": "train a model further, or an adapter of it",
    "merge": "store a model with an adapter merged into it",
    "quantize": "store a model with 8- or 4-bit weights",
    "convert": "store a model in another layout",
    "completion": "print a script that lets a shell complete commands",
}

# In which folder of `commands` a command lies, if not in `commands` itself.
FOLDERS = {
    "evaluation": ("bench", "evaluate", "lambada", "score"),
    "models": ("convert", "download", "info", "merge", "models", "quantize"),
    "text": ("chat", "generate", "ingest", "inspect", "serve"),
    "training": ("finetune", "train"),
}

EXIT_FAILURE = 2
# What a shell reports for programs ended by the signals SIGINT and SIGPIPE.
EXIT_INTERRUPTED = 130
EXIT_CLOSED_PIPE = 141

OUT_OF_MEMORY = (
    "not enough memory: end other programs, or ask for less, as by a smaller batch or a shorter "
    "text, or by --weights int4"
)
NO_FOLDER = "the folder that this was started in does not exist any more; change to one that does"
LONGEST_COMPLAINT = 1000
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

EPILOG = """\
examples:
  anymamba generate "ROMEO:" --max-new-tokens 300
  anymamba chat
  anymamba COMMAND --help

exit status:
  0    done
  1    a defect of this program, with a traceback to report
  2    a mistake or something missing, named in one line on standard error
  130  interrupted by Ctrl-C
  141  whoever read the output stopped reading
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are errors like all others: one line each."""

    def error(self, message: str) -> NoReturn:
        if len(message) > LONGEST_COMPLAINT:  # it quotes what was given
            half = LONGEST_COMPLAINT // 2
            message = f"{message[:half]} ... {message[-half:]}"
        raise InputError(f"{message} (see {self.prog} --help)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse what is left over here, where the command's own options are known."""
        arguments, unknown = super().parse_known_args(args, namespace)
        lists = [a.dest for a in self._actions if a.nargs == "*" and not a.option_strings]
        if lists and not any(word.startswith("-") for word in unknown):
            # argparse gives such a list only what stands before the first option.
            setattr(arguments, lists[0], [*getattr(arguments, lists[0]), *unknown])
            unknown = []
        if unknown:
            self.error(self._why_unknown(unknown))
        return arguments, unknown

    def _why_unknown(self, unknown: Sequence[str]) -> str:
        option = next((word for word in unknown if word.startswith("-")), None)
        if option is None:
            return f"{unknown[0]!r} is one argument too many"
        name = option.partition("=")[0]
        return f"there is no option {name}" + did_you_mean(name, self._option_string_actions)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The nearest of the known words as the end of a complaint, or nothing."""
    from difflib import get_close_matches

    nearest = get_close_matches(word, list(known), n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status, one of those that `--help` lists."""
    argv = sys.argv[1:] if argv is None else argv
    open_missing()
    # Other people's programs keep the output that Python gives them.
    if isinstance(sys.stdout, io.TextIOWrapper) and argv[:1] != ["run"]:
        prepare(sys.stdout)
    try:
        run_command(argv)
        sys.stdout.flush()
    except AnyMambaError as error:
        tell_error(error)
        return EXIT_FAILURE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except (MemoryError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
        tell(f"anymamba: {OUT_OF_MEMORY}")
        return EXIT_FAILURE
    except OSError as error:
        if is_closed_pipe(error):
            forget(sys.stdout)
            return EXIT_CLOSED_PIPE
        # Files are written by functions that say which one it was: what is left is the output.
        if error.errno in NO_SPACE:
            forget(sys.stdout)
            tell(f"anymamba: cannot write the output: {error.strerror}; free some space")
        elif is_without_folder(error):
            tell(f"anymamba: {NO_FOLDER}")
        else:
            raise
        return EXIT_FAILURE
    return 0


def is_lack_of_memory(error: Exception) -> bool:
    """Whether the system or a GPU gave no more memory, in Python's words or in PyTorch's."""
    told = str(error)
    return isinstance(error, MemoryError) or "not enough memory" in told or "out of memory" in told


def is_closed_pipe(error: OSError) -> bool:
    """Whether nobody reads the output any more, which Windows calls an invalid argument."""
    is_on_windows = os.name == "nt" and error.errno == errno.EINVAL and error.filename is None
    return isinstance(error, BrokenPipeError) or is_on_windows


def is_without_folder(error: OSError) -> bool:
    """Whether the folder that the command was started in is gone, so that no name means a file."""
    if error.errno != errno.ENOENT:
        return False
    try:
        Path.cwd()
    except FileNotFoundError:
        return True
    return False


def run_command(argv: Sequence[str]) -> None:
    """Parse the arguments and call the command that they name; without any, show the help."""
    if not argv:
        build_parser([]).print_help()
        return
    command, options = parse(argv)
    command.run(options)


def parse(argv: Sequence[str]) -> tuple[ModuleType, Any]:
    """The module of the command that the arguments name, and its `Options`."""
    # The command is the first argument that is no option: before it stand none with a value.
    asked = next((argument for argument in argv if not argument.startswith("-")), None)
    parser = build_parser([asked] if asked in COMMANDS else [])
    if asked is not None and asked not in COMMANDS:
        parser.error(f"there is no command {asked!r}" + did_you_mean(asked, COMMANDS))
    arguments = parser.parse_args(argv)
    if asked is None:
        parser.error("a command is missing")
    from anymamba.cli.options.fields import read_options

    command = import_module(module_of(arguments.command))
    return command, read_options(command.Options, arguments)


def module_of(command: str) -> str:
    """The full name of a command's module."""
    folder = next((f"{name}." for name, commands in FOLDERS.items() if command in commands), "")
    return f"anymamba.cli.commands.{folder}{command}"


def build_parser(complete: Collection[str]) -> Parser:
    """The parser of the command line, in which only the commands named have their options.

    Loading the module of a command that nobody asked for would only cost time.
    """
    top = Parser(
        prog="anymamba",
        description="Mamba language models on any machine.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"anymamba {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    for name, summary in COMMANDS.items():
        parser = commands.add_parser(
            name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name in complete:
            from anymamba.cli.options.fields import add_options

            command = import_module(module_of(name))
            parser.description, parser.epilog = command.DESCRIPTION, command.EXAMPLES
            parser.usage = getattr(command, "USAGE", None)
            add_options(parser, command.Options)
    return top


if __name__ == "__main__":
    sys.exit(main())
