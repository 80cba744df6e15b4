"""The options that name a model and say how its weights are held."""

from __future__ import annotations

import argparse

from anymamba.cli.values import integer
from anymamba.runtime.native import MOST_THREADS

__all__ = [
    "WEIGHTS",
    "add_adapter_argument",
    "add_model_arguments",
    "add_offline_argument",
    "add_threads_argument",
    "add_weights_arguments",
]

WEIGHTS = ("auto", "f32", "bf16", "int8", "int4")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `--model`, `--tokenizer` and `--offline`."""
    group = parser.add_argument_group("the model")
    group.add_argument(
        "--model",
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


def add_weights_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `--weights` and `--threads`."""
    group = parser.add_argument_group("computing")
    group.add_argument(
        "--weights",
        choices=WEIGHTS,
        default="auto",
        help="how the weights are held; int8 and int4 quantize on loading; auto: as stored",
    )
    add_threads_argument(group)


def add_threads_argument(group: argparse._ActionsContainer) -> None:
    """Declare `--threads`."""
    group.add_argument(
        "--threads",
        type=integer(1, MOST_THREADS),
        metavar="N",
        help="how many threads compute (default: ANYMAMBA_NUM_THREADS, else one a core)",
    )
