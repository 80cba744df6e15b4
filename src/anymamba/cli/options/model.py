"""The options that name a model and say how its weights are held."""

from __future__ import annotations

import argparse

from anymamba.arithmetic import MATMUL_DTYPES
from anymamba.cli.options.argument_types import integer
from anymamba.errors import InputError
from anymamba.runtime.native import MOST_THREADS

__all__ = [
    "WEIGHTS",
    "add_adapter_argument",
    "add_model_arguments",
    "add_offline_argument",
    "add_places",
    "add_threads_argument",
    "add_weights_arguments",
    "places_of",
]

WEIGHTS = ("auto", "f32", "bf16", "int8", "int4")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `--model` (`-m`), `--tokenizer` and `--offline`."""
    group = parser.add_argument_group("the model")
    group.add_argument(
        "--model",
        "-m",
        metavar="FOLDER",
        help="a folder, a GGUF file, or a name on the hub (default: the bundled one)",
    )
    group.add_argument(
        "--tokenizer",
        metavar="FOLDER",
        help="a folder with a tokenizer.json, or that file, if the model comes without one",
    )
    add_offline_argument(group)


def add_adapter_argument(parser: argparse.ArgumentParser) -> None:
    """Declare `--adapter`."""
    parser.add_argument(
        "--adapter",
        metavar="FOLDER",
        help="a LoRA or DoRA adapter, merged on loading; without --model its own model is used",
    )


def add_offline_argument(group: argparse._ActionsContainer) -> None:
    """Declare `--offline`."""
    group.add_argument(
        "--offline",
        action="store_true",
        help="use what was downloaded before, and no network",
    )


def add_places(parser: argparse.ArgumentParser, source: str, what: str, where: str) -> None:
    """Declare what a command reads and what it writes, by place or by name.

    Args:
        parser: the command's.
        source: the source's name, such as `model` for `--model`.
        what: the source in a line.
        where: the destination in a line.
    """
    parser.set_defaults(source_name=source)
    parser.add_argument("places", nargs="*", metavar="SRC DST", help=f"{what}; {where}")
    parser.add_argument(
        f"--{source}", f"-{source[0]}", dest="source", metavar="FOLDER", help="SRC by name"
    )
    parser.add_argument("--output", "-o", dest="destination", metavar="FOLDER", help="DST by name")


def places_of(arguments: argparse.Namespace) -> tuple[str, str]:
    """The source and the destination that the options of `add_places` name.

    Raises:
        InputError: one of them is missing, or there is one too many.
    """
    places = list(arguments.places)
    see = f"(see anymamba {arguments.command} --help)"

    def place(named: str | None, name: str, option: str) -> str:
        if named is not None:
            return named
        if not places:
            raise InputError(f"{name} is missing: give it, or --{option} {name} {see}")
        return str(places.pop(0))

    source = place(arguments.source, "SRC", arguments.source_name)
    destination = place(arguments.destination, "DST", "output")
    if places:
        raise InputError(
            f"{places[0]!r} is one argument too many: give SRC and DST once each {see}"
        )
    return source, destination


def add_weights_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `--weights`, `--matmul-dtype` and `--threads` (`-t`)."""
    group = parser.add_argument_group("computing")
    group.add_argument(
        "--weights",
        choices=WEIGHTS,
        default="auto",
        help="how the weights are held; int8 and int4 quantize on loading; auto: as stored",
    )
    group.add_argument(
        "--matmul-dtype",
        choices=MATMUL_DTYPES,
        help="what activations are when multiplied with bfloat16 weights; bfloat16 is coarser, and "
        "faster on some processors (default: ANYMAMBA_MATMUL_DTYPE, else float32)",
    )
    add_threads_argument(group)


def add_threads_argument(group: argparse._ActionsContainer) -> None:
    """Declare `--threads` (`-t`)."""
    group.add_argument(
        "--threads",
        "-t",
        type=integer(1, MOST_THREADS),
        metavar="N",
        help="how many threads compute (default: ANYMAMBA_NUM_THREADS, else one a core)",
    )
