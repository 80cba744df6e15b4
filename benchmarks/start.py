"""How long until the first token, and does reading a long text stay even? Whole processes.

Each case is a process of its own, as a user starts it: interpreter, imports, mapping the weights
and the first token. Then `anymamba ingest` reads texts of several lengths.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from anymamba.assets import bundled_model
from common.machine import describe
from common.options import options_from, parser
from common.results import finish
from common.shapes import MAMBA_130M, QUICK
from common.tables import NAME, Column, Row, Table, timed
from common.timing import Case, interleave
from contenders.anymamba_model import random_model

KINDS = ("int8", "int4")
LENGTHS = (100_000, 300_000, 1_000_000)
QUICK_LENGTHS = (1_000, 3_000)
INGESTED = (
    NAME,
    Column("peak_megabytes", "peak, MB", "{:.1f}"),
    Column("tokens_per_second", "tokens/s", "{:.0f}"),
    Column("share", "x the first's speed", "{:.2f}"),
)


def main() -> None:
    """Measure, then print and write."""
    options = options_from(parser("start", __doc__ or "").parse_args())
    machine = describe(options.quick)
    rounds = options.rounds or (2 if options.quick else 9)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tables = [first_tokens(folder, options.quick, rounds), ingested(folder, options.quick)]
    finish("start", options, machine, tables)


def first_tokens(folder: Path, quick: bool, rounds: int) -> Table:
    """Processes that write one token."""
    random_model(QUICK if quick else MAMBA_130M).save_pretrained(folder / "f32")
    cases = [
        Case("python -c 'import numpy'", partial(run, sys.executable, "-c", "import numpy")),
        Case("generate, bundled model", partial(generate, bundled_model(), "ROMEO:")),
    ]
    load = (
        "import sys, anymamba; "
        "anymamba.load(sys.argv[1]).generate([5], max_new_tokens=1, do_sample=False)"
    )
    for kind in KINDS:
        target = folder / kind
        anymamba("quantize", folder / "f32", target, "--weights", kind)
        cases.append(
            Case(f"load and write, {kind} folder", partial(run, sys.executable, "-c", load, target))
        )
    timings = interleave(cases, rounds)
    rows = [timed(name, timing) for name, timing in timings.items()]
    return Table("Whole processes up to their first token", rows=rows)


def ingested(folder: Path, quick: bool) -> Table:
    """`anymamba ingest` of more and more text, with the bundled model."""
    lengths = QUICK_LENGTHS if quick else LENGTHS
    rows: list[Row] = []
    for length in lengths:
        text = folder / f"{length}.txt"
        text.write_text("To be, or not to be, that is the question.\n" * (length // 43 + 1))
        with text.open("r+") as file:
            file.truncate(length)
        state = folder / "state"
        said = anymamba("ingest", text, "--save-state", state, "--json")
        figures = json.loads(said)["figures"]
        speed = figures["tokens_per_second"]
        rows.append(
            {
                "name": f"{length:,} tokens",
                "peak_megabytes": figures["peak_memory_bytes"] / 1e6,
                "tokens_per_second": speed,
                "share": speed / (rows[0]["tokens_per_second"] if rows else speed),
            }
        )
    return Table("anymamba ingest, bundled model", INGESTED, rows)


def generate(model: Path, prompt: str) -> None:
    """The command that a user would type."""
    anymamba("generate", prompt, "--model", model, "--max-new-tokens", "1")


def anymamba(*arguments: object) -> bytes:
    """What the command line prints, in a process of its own."""
    return run(sys.executable, "-m", "anymamba", *arguments)


def run(*command: object) -> bytes:
    """What a process prints."""
    done = subprocess.run([str(part) for part in command], capture_output=True, check=True)
    return done.stdout


if __name__ == "__main__":
    main()
