"""`anymamba bench`: how fast a model runs here, by kind of weights and number of threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from anymamba.cli.options.fields import flag, integer_option, offline_flag, option
from anymamba.cli.options.model import WEIGHTS
from anymamba.cli.terminal.output import json_line, say, tell
from anymamba.cli.terminal.silence import silence
from anymamba.errors import ConfigError
from anymamba.runtime.native import MOST_THREADS

if TYPE_CHECKING:
    from anymamba.cli.speed import Speed

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


@dataclass(frozen=True)
class Options:
    """What `anymamba bench` is asked for."""

    model: str | None = option(
        nargs="?", metavar="MODEL", help="a folder, a GGUF file or a name on the hub"
    )
    weights: Sequence[str] | None = option(
        "--weights",
        nargs="+",
        choices=WEIGHTS,
        help="weight types; default: all, of a quantized model its own",
    )
    threads: Sequence[int] | None = integer_option(
        "--threads",
        nargs="+",
        high=MOST_THREADS,
        help="numbers of threads; default: 1 and one a core",
    )
    prompt_tokens: int = integer_option("--prompt-tokens", default=512, help="default 512")
    new_tokens: int = integer_option("--new-tokens", default=64, help="default 64")
    repeats: int = integer_option("--repeats", default=3, help="default 3; the median counts")
    offline: bool = offline_flag()
    json: bool = flag("--json", "print one JSON object")


def run(options: Options) -> None:
    """Measure one combination after the other, and print."""
    from anymamba.cli.speed import measure
    from anymamba.cli.terminal.table import columns
    from anymamba.runtime.loading import load

    speeds: list[Speed] = []
    for kind in kinds(options):
        for threads in dict.fromkeys(options.threads or default_threads()):
            if not options.json:
                tell(f"measuring {kind} with {threads} threads")
            with silence():
                engine = load(options.model, weights=kind, threads=threads, offline=options.offline)
                speed = measure(
                    engine,
                    threads,
                    prompt_tokens=options.prompt_tokens,
                    new_tokens=options.new_tokens,
                    repeats=options.repeats,
                )
                speeds.append(speed)
    if options.json:
        model = "bundled" if options.model is None else options.model
        print(json_line({"model": model, "speeds": [speed.as_json() for speed in speeds]}))
        return
    head = ("weights", "threads", "size", "prefill", "decode", "limit", "of the limit")
    say(columns([head, *map(row, speeds)]))
    say("prefill, decode and limit in tokens a second")


def kinds(options: Options) -> list[str]:
    """The weight types to measure, once it is sure that the model can be had in all of them."""
    from anymamba.runtime.loading import load

    asked = list(dict.fromkeys(options.weights or KINDS))
    if not {*asked} & {*QUANTIZED}:
        return asked
    with silence():
        stored = load(options.model, threads=1, offline=options.offline).weight_type
    if stored not in QUANTIZED:
        return asked
    if options.weights is None:
        return [stored]
    impossible = [kind for kind in asked if kind in QUANTIZED and kind != stored]
    if impossible:
        raise ConfigError(
            f"the weights are {stored} already and cannot be measured as {impossible[0]}, which "
            f"would round them twice; leave it out, or name the model as it was before"
        )
    return asked


def row(speed: Speed) -> tuple[str, ...]:
    """A line of the table."""
    from anymamba.cli.terminal.sizes import size

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
