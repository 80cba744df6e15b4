"""Do memory and speed of the runtime depend on how much was read before? Draws the answer.

One text is read into one state with the bundled model. At each length stand the memory of the
process, the bytes of the state, how fast the last chunk was read and how fast text follows.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from common.machine import describe
from common.options import options_from, parser
from common.results import finish
from common.tables import NAME, Column, Row, Table

LENGTHS = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
QUICK_LENGTHS = (100, 1_000)
# Readable on white and on black.
INK = "#7a828e"
COLUMNS = (
    NAME,
    Column("resident_megabytes", "process, MB", "{:.1f}"),
    Column("state_kilobytes", "state, kB", "{:.0f}"),
    Column("reading", "reading, tokens/s", "{:.0f}"),
    Column("writing", "writing, tokens/s", "{:.0f}"),
)


def main() -> int:
    """Read on and on, and measure at each length."""
    options = options_from(parser("context", __doc__ or "").parse_args())
    machine = describe(options.quick)
    lengths = QUICK_LENGTHS if options.quick else LENGTHS
    script = Path(__file__).with_name("common") / "context_growth.py"
    command = [sys.executable, script, torch.get_num_threads(), *lengths]
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, check=True)
    rows: list[Row] = json.loads(done.stdout)
    table = Table("Memory and speed by what was read before, bundled model", COLUMNS, rows)
    finish("context", options, machine, [table])
    if not options.quick:
        draw(rows, options.output / "context.svg")
    return 0


def draw(rows: list[Row], path: Path) -> None:
    """Memory on the left, speed on the right."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("no chart: matplotlib is not installed (make bench-peers)")
        return
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "anymamba", "font.size": 9, "text.color": INK})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3))
    lengths = [row["length"] for row in rows]
    panels = (
        ("memory of the process, MB", {"resident_megabytes": "process"}),
        ("tokens a second", {"reading": "reading", "writing": "writing"}),
    )
    for axis, (title, curves) in zip(axes, panels, strict=True):
        for (key, label), color in zip(curves.items(), ("#d9730d", "#2f9e6e"), strict=False):
            axis.plot(lengths, [row[key] for row in rows], marker="o", color=color, label=label)
        axis.set_xscale("log")
        axis.set_ylim(bottom=0)
        axis.set_xlabel("tokens read before", color=INK)
        axis.set_title(title, fontsize=9)
        axis.tick_params(colors=INK)
        axis.spines[["top", "right"]].set_visible(False)
        if len(curves) > 1:
            axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, transparent=True, metadata={"Date": None})
    print(f"drawn to {path}")


if __name__ == "__main__":
    sys.exit(main())
