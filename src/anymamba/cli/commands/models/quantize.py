"""`anymamba quantize`: store a model with weights of 8 or 4 bits, once."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from anymamba.cli.options.argument_types import finite
from anymamba.cli.options.model import (
    add_offline_argument,
    add_places,
    add_threads_argument,
    places_of,
)
from anymamba.cli.terminal.output import say
from anymamba.cli.terminal.silence import quiet

__all__ = ["add_arguments", "run"]

DESCRIPTION = """\
Store a model with weights of 8 or 4 bits, from which it loads at once and decodes faster. The
large matrices are rounded in groups that share a scale; the small and sensitive ones stay
bfloat16 or float32. With --calibrate a text of the kind that the model is for decides how each
weight is rounded, which takes longer and is more exact.
"""
EXAMPLES = """\
examples:
  anymamba quantize ./my-model ./my-model-int8 --weights int8
  anymamba quantize state-spaces/mamba-130m-hf ./mamba-int4 --weights int4 --group 32
  anymamba quantize ./my-model ./my-model-int4 --calibrate book.txt --score other-book.txt
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `anymamba quantize`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    add_places(
        parser, "model", "SRC is a folder, a GGUF file, or a name on the hub", "DST is a new folder"
    )
    parser.add_argument("--weights", choices=("int8", "int4"), default="int4", help="default int4")
    parser.add_argument(
        "--group",
        type=int,
        choices=(32, 64, 128),
        default=128,
        help="how many weights share a scale; default 128",
    )
    parser.add_argument(
        "--offset", action="store_true", help="keep a minimum a group beside its scale"
    )
    parser.add_argument(
        "--calibrate", metavar="FILE", help="a text to choose the rounding by; - is standard input"
    )
    parser.add_argument(
        "--score", metavar="FILE", help="a text to tell the perplexity on, before and after"
    )
    parser.add_argument(
        "--tokenizer", metavar="FOLDER", help="a tokenizer, if the model comes without one"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    add_threads_argument(parser)
    add_offline_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> None:
    """Quantize, and tell what it costs and gains."""
    from anymamba.checkpoint.atomic_folder import check_apart, check_destination
    from anymamba.cli.terminal.progress import Steps
    from anymamba.cli.text.files import read_once, read_text
    from anymamba.runtime.convert import quantize_checkpoint

    arguments.source, arguments.destination = places_of(arguments)
    read_once([arguments.score, arguments.calibrate])
    score = None if arguments.score is None else read_text(arguments.score)
    calibrate = None if arguments.calibrate is None else read_text(arguments.calibrate)
    figures: dict[str, Any] = {}
    with quiet():
        if score is not None:
            # First of all, so that nothing is written where the text cannot be scored.
            check_apart(arguments.source, arguments.destination)
            check_destination(arguments.destination, arguments.overwrite)
            figures["perplexity_before"] = perplexity(arguments, place_of(arguments), score)
        start = time.perf_counter()
        with Steps("tensors", visible=not arguments.json) as steps:
            written = quantize_checkpoint(
                arguments.source,
                arguments.destination,
                weights=arguments.weights,
                group=arguments.group,
                symmetric=not arguments.offset,
                calibrate=calibrate,
                tokenizer=arguments.tokenizer,
                threads=arguments.threads,
                overwrite=arguments.overwrite,
                offline=arguments.offline,
                progress=steps.show,
            )
        seconds = time.perf_counter() - start
        figures |= {
            "source_bytes": weight_bytes_in(place_of(arguments)),
            "destination_bytes": weight_bytes_in(written),
            "seconds": round(seconds, 1),
        }
        if score is not None:
            figures["perplexity_after"] = perplexity(arguments, written, score)
    report(arguments, written, figures)


def place_of(arguments: argparse.Namespace) -> Path:
    """Where the source is, downloaded if need be."""
    from anymamba.checkpoint import resolve
    from anymamba.checkpoint.gguf import find_gguf
    from anymamba.checkpoint.io import user_path

    file = find_gguf(user_path(arguments.source))
    return file or resolve(arguments.source, offline=arguments.offline)


def weight_bytes_in(place: Path) -> int:
    """The bytes of a model's weight files."""
    from anymamba.checkpoint import open_checkpoint
    from anymamba.checkpoint.gguf import read_gguf_files

    if place.is_file():
        return sum(len(data) for data in read_gguf_files(place).data.values())
    return sum(file.stat().st_size for file in open_checkpoint(place).files.paths)


def perplexity(arguments: argparse.Namespace, place: Path, text: str) -> float:
    """How well the model in a place predicts a text."""
    from anymamba.cli.commands.evaluation.score import score_text
    from anymamba.runtime.loading import load

    engine = load(place, threads=arguments.threads, tokenizer=arguments.tokenizer)
    return float(score_text(engine, text)["perplexity"])


def report(arguments: argparse.Namespace, written: Path, figures: dict[str, Any]) -> None:
    """Print the figures."""
    from anymamba.cli.terminal.sizes import size
    from anymamba.cli.terminal.table import table

    if arguments.json:
        facts = {"destination": str(written), "weights": arguments.weights}
        for name in figures.keys() & {"perplexity_before", "perplexity_after"}:
            figures[name] = finite(figures[name])
        print(json.dumps(facts | figures))
        return
    before, after = figures["source_bytes"], figures["destination_bytes"]
    rows: list[tuple[str, object]] = [
        ("written", written),
        ("weights", f"{size(before)} before, {size(after)} after ({after / before:.0%})"),
    ]
    if "perplexity_after" in figures:
        old, new = figures["perplexity_before"], figures["perplexity_after"]
        rows.append(("perplexity", f"{old:.4f} before, {new:.4f} after ({new / old - 1:+.2%})"))
    say(table(rows))
