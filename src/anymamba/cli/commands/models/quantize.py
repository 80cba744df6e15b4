"""`anymamba quantize`: store a model with weights of 8 or 4 bits, once."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anymamba.cli.options.fields import flag, option
from anymamba.cli.options.model import threads_option
from anymamba.cli.options.places import Places, places_of
from anymamba.cli.terminal.output import json_line, say
from anymamba.cli.terminal.silence import silence

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


@dataclass(frozen=True)
class Options(Places):
    """What `anymamba quantize` is asked for."""

    weights: str = option(
        "--weights", choices=("int8", "int4"), default="int4", help="default int4"
    )
    group: int = option(
        "--group",
        type=int,
        choices=(32, 64, 128),
        default=128,
        help="how many weights share a scale; default 128",
    )
    offset: bool = flag("--offset", "keep an offset for each group beside its scale")
    calibrate: str | None = option(
        "--calibrate", metavar="FILE", help="a text to choose the rounding by; - is standard input"
    )
    score: str | None = option(
        "--score", metavar="FILE", help="a text to measure the perplexity on, before and after"
    )
    tokenizer: str | None = option(
        "--tokenizer", metavar="FOLDER", help="a tokenizer, if the model comes without one"
    )
    threads: int | None = threads_option()


def run(options: Options) -> None:
    """Quantize, and tell what it costs and gains."""
    from anymamba.checkpoint.atomic_folder import check_apart, check_destination
    from anymamba.cli.terminal.progress import Steps
    from anymamba.cli.text.files import read_once, read_text
    from anymamba.runtime.convert import quantize_checkpoint

    source, destination = places_of(options)
    read_once([options.score, options.calibrate])
    score = None if options.score is None else read_text(options.score)
    calibrate = None if options.calibrate is None else read_text(options.calibrate)
    figures: dict[str, Any] = {}
    with silence():
        if score is not None:
            # First of all, so that nothing is written where the text cannot be scored.
            check_apart(source, destination)
            check_destination(destination, options.overwrite)
            figures["perplexity_before"] = perplexity(
                options, place_of(source, options.offline), score
            )
        start = time.perf_counter()
        with Steps("tensors", visible=not options.json) as steps:
            written = quantize_checkpoint(
                source,
                destination,
                weights=options.weights,
                group=options.group,
                symmetric=not options.offset,
                calibrate=calibrate,
                tokenizer=options.tokenizer,
                threads=options.threads,
                overwrite=options.overwrite,
                offline=options.offline,
                progress=steps.show,
            )
        seconds = time.perf_counter() - start
        figures |= {
            "source_bytes": weight_bytes_in(place_of(source, options.offline)),
            "destination_bytes": weight_bytes_in(written),
            "seconds": round(seconds, 1),
        }
        if score is not None:
            figures["perplexity_after"] = perplexity(options, written, score)
    report(options, written, figures)


def place_of(source: str, offline: bool) -> Path:
    """Where the source is, downloaded if need be."""
    from anymamba.checkpoint import resolve
    from anymamba.checkpoint.gguf import find_gguf
    from anymamba.checkpoint.io import user_path

    file = find_gguf(user_path(source))
    return file or resolve(source, offline=offline)


def weight_bytes_in(place: Path) -> int:
    """The bytes of a model's weight files."""
    from anymamba.checkpoint import open_checkpoint
    from anymamba.checkpoint.gguf.parts import read_gguf_files

    if place.is_file():
        return sum(len(data) for data in read_gguf_files(place).data.values())
    return sum(file.stat().st_size for file in open_checkpoint(place).files.paths)


def perplexity(options: Options, place: Path, text: str) -> float:
    """How well the model in a place predicts a text."""
    from anymamba.cli.commands.evaluation.score import score_text
    from anymamba.runtime.loading import load

    engine = load(place, threads=options.threads, tokenizer=options.tokenizer)
    return float(score_text(engine, text)["perplexity"])


def report(options: Options, written: Path, figures: dict[str, Any]) -> None:
    """Print the figures."""
    from anymamba.cli.terminal.sizes import size
    from anymamba.cli.terminal.table import table

    if options.json:
        facts = {"destination": str(written), "weights": options.weights}
        print(json_line(facts | figures))
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
