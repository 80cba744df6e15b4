"""`anymamba bench`: how fast a model runs here, by kind of weights and number of threads."""

from __future__ import annotations

import argparse
import json

from anymamba.cli.options.argument_types import integer
from anymamba.cli.options.model import WEIGHTS, add_offline_argument
from anymamba.cli.terminal.output import say, tell
from anymamba.cli.terminal.silence import quiet
from anymamba.errors import ConfigError
from anymamba.runtime.native import MOST_THREADS

__all__ = ["add_arguments", "run"]

DESCRIPTION = """\
Measure how fast a model reads a prompt (prefill) and writes tokens (decode), for each kind of
weights and number of threads. Beside it stands the limit of this machine: each new token reads
all weights once, so that nothing writes faster than memory is read.
"""
EXAMPLES = """\
examples:
  anymamba bench
  anymamba bench state-spaces/mamba-130m-hf --weights int8 int4
  anymamba bench ./my-model --threads 1 2 4 --json
"""
QUANTIZED = ("int8", "int4")
KINDS = tuple(kind for kind in WEIGHTS if kind != "auto")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `anymamba bench`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a folder, a GGUF file or a name on the hub"
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        choices=WEIGHTS,
        help="kinds; default: all, of a quantized model its own",
    )
    parser.add_argument(
        "--threads",
        nargs="+",
        type=integer(1, MOST_THREADS),
        metavar="N",
        help="numbers of threads; default: 1 and one a core",
    )
    parser.add_argument(
        "--prompt-tokens", type=integer(1), default=512, metavar="N", help="default 512"
    )
    parser.add_argument("--new-tokens", type=integer(1), default=64, metavar="N", help="default 64")
    parser.add_argument(
        "--repeats", type=integer(1), default=3, metavar="N", help="default 3; the median counts"
    )
    add_offline_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> None:
    """Measure one combination after the other, and print."""
    from anymamba.cli.speed import Effort, Speed, measure
    from anymamba.cli.terminal.table import columns
    from anymamba.runtime.loading import load

    effort = Effort(arguments.prompt_tokens, arguments.new_tokens, arguments.repeats)
    speeds: list[Speed] = []
    for kind in kinds(arguments):
        for threads in dict.fromkeys(arguments.threads or default_threads()):
            if not arguments.json:
                tell(f"measuring {kind} with {threads} threads")
            with quiet():
                engine = load(
                    arguments.model, weights=kind, threads=threads, offline=arguments.offline
                )
                speeds.append(measure(engine, threads, effort))
    if arguments.json:
        model = "bundled" if arguments.model is None else arguments.model
        print(json.dumps({"model": model, "speeds": [speed.as_json() for speed in speeds]}))
        return
    head = ("weights", "threads", "size", "prefill", "decode", "limit", "of the limit")
    say(columns([head, *map(row, speeds)]))
    say("prefill, decode and limit in tokens a second")


def kinds(arguments: argparse.Namespace) -> list[str]:
    """The kinds to measure, once it is sure that all of them can be had.

    Raises:
        ConfigError: the model is stored in other bits than a kind that was asked for.
    """
    from anymamba.runtime.loading import load

    asked = list(dict.fromkeys(arguments.weights or KINDS))
    if not {*asked} & {*QUANTIZED}:
        return asked
    with quiet():
        stored = load(arguments.model, threads=1, offline=arguments.offline).weights_kind
    if stored not in QUANTIZED:
        return asked
    if arguments.weights is None:
        return [stored]
    impossible = [kind for kind in asked if kind in QUANTIZED and kind != stored]
    if impossible:
        raise ConfigError(
            f"the weights are {stored} already and cannot be measured as {impossible[0]}, which "
            f"would round them twice; leave it out, or name the model as it was before"
        )
    return asked


def row(speed: object) -> tuple[str, ...]:
    """A line of the table."""
    from anymamba.cli.speed import Speed
    from anymamba.cli.terminal.sizes import size

    assert isinstance(speed, Speed)
    return (
        speed.weights,
        str(speed.threads),
        size(speed.weight_bytes),
        f"{speed.prefill_tokens_per_second:,.0f}",
        f"{speed.decode_tokens_per_second:,.1f}",
        f"{speed.limit_tokens_per_second:,.1f}",
        f"{speed.share_of_limit:.2f}",
    )


def default_threads() -> list[int]:
    """One, and as many as the runtime would take."""
    from anymamba.processors import available_processors

    return [1, available_processors()]
