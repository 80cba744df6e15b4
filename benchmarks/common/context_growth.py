"""Reads a text on and on and measures at each length; without PyTorch, in a process of its own.

Run by context.py: python benchmarks/common/context_growth.py THREADS LENGTH... prints rows as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import anymamba
from anymamba import Engine, State

WRITTEN = 200
TEXT = "Now is the winter of our discontent made glorious summer by this sun of York. "


def main() -> None:
    """Read and measure."""
    threads, *lengths = map(int, sys.argv[1:])
    engine = anymamba.load(threads=threads)
    state = engine.state()
    engine.generate(TEXT, WRITTEN, stop_ids=())  # loads what is loaded once
    print(json.dumps([measured(engine, state, length) for length in lengths]))


def measured(engine: Engine, state: State, length: int) -> dict[str, Any]:
    """Read up to `length`, then write from a copy."""
    missing = length - state.token_count
    text = (TEXT * (missing // len(TEXT) + 1))[:missing]  # one byte a token
    start = time.perf_counter()
    engine.prefill(state, text)
    read = time.perf_counter() - start
    fork = state.copy()
    start = time.perf_counter()
    engine.generate("", WRITTEN, state=fork, stop_ids=(), do_sample=False)
    wrote = time.perf_counter() - start
    return {
        "name": f"{length:,}",
        "length": length,
        "resident_megabytes": resident() / 1e6,
        "state_kilobytes": state.nbytes / 1e3,
        "reading": missing / read,
        "writing": WRITTEN / wrote,
    }


def resident() -> int:
    """The bytes of memory that this process holds now."""
    with Path("/proc/self/status").open(encoding="utf-8") as status:
        fields = dict(line.split(":", 1) for line in status)
    return int(fields["VmRSS"].split()[0]) * 1024


if __name__ == "__main__":
    main()
