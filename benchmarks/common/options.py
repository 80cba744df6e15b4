"""The options that all scripts have."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["RESULTS", "Options", "options_from", "parser"]

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Options:
    """What was asked for. `rounds` is None where the script's own number is to be used."""

    quick: bool
    peers: bool
    rounds: int | None
    output: Path


def parser(script: str, question: str) -> argparse.ArgumentParser:
    """A parser with the common options.

    Args:
        script: its name without the ending.
        question: what it measures, in a sentence.
    """
    made = argparse.ArgumentParser(
        description=question, epilog=f"example: python benchmarks/{script}.py --rounds 5"
    )
    made.add_argument("--quick", action="store_true", help="a smoke run with a tiny model")
    made.add_argument("--no-peers", action="store_true", help="AnyMamba and the limit alone")
    made.add_argument("--rounds", type=_at_least_one, help="how often each case takes its turn")
    made.add_argument(
        "--threads", type=_at_least_one, help="how many all cases use (default: PyTorch's number)"
    )
    made.add_argument(
        "--output",
        type=Path,
        help="folder of the JSON file (default: benchmarks/results, for smoke runs quick/ in it)",
    )
    return made


def options_from(arguments: argparse.Namespace) -> Options:
    """Read the common options; sets PyTorch's threads, which the other cases follow."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    default = RESULTS / "quick" if arguments.quick else RESULTS
    return Options(
        arguments.quick,
        not arguments.no_peers,
        2 if arguments.quick and not arguments.rounds else arguments.rounds,
        arguments.output or default,
    )


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)
