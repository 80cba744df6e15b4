"""Draw the chart of the last results: AnyMamba and its peers beside the machine's limits."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common.options import RESULTS
from common.results import read_result

# Readable on white and on black.
OURS, OTHERS, LIMIT, INK = "#d9730d", "#8a94a6", "#2f9e6e", "#7a828e"


@dataclass(frozen=True)
class Panel:
    """One question: the script and which of its tables answers it."""

    benchmark: str
    table: int


PANELS = (Panel("prefill", 0), Panel("decode", 0), Panel("train", 0))


def main() -> int:
    """Read the command line, draw what there is."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: python benchmarks/chart.py"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--output", type=Path, help="SVG or PNG (default: overview.svg among them)")
    arguments = parser.parse_args()
    if find_spec("matplotlib") is None:
        print("matplotlib is not installed: pip install 'anymamba[peers]'", file=sys.stderr)
        return 1
    found = [(panel, read_result(arguments.results, panel.benchmark)) for panel in PANELS]
    drawn = [(panel, result) for panel, result in found if result is not None]
    if not drawn:
        print(f"no results in {arguments.results}: run make bench first", file=sys.stderr)
        return 1
    output = arguments.output or arguments.results / "overview.svg"
    draw(drawn, output)
    print(f"drawn to {output}")
    return 0


def draw(panels: Sequence[tuple[Panel, Mapping[str, Any]]], output: Path) -> None:
    """One panel a question, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    # The same numbers give the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "anymamba", "font.size": 9, "text.color": INK})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 3.6), layout="constrained", squeeze=False
    )
    for axis, (panel, result) in zip(axes[0], panels, strict=True):
        bars(axis, result["tables"][panel.table])
    machine = panels[0][1]["machine"]
    figure.suptitle(
        f"mamba-130m, batch 1, tokens a second; {machine['processor']}, "
        f"{machine['threads']} threads"
    )
    metadata = {"Date": None} if output.suffix == ".svg" else None
    figure.savefig(output, transparent=True, metadata=metadata, dpi=160)


def bars(axis: Any, table: Mapping[str, Any]) -> None:
    """Speeds as bars, the fastest on top, and limits as lines from top to bottom."""
    rows = [row for row in table["rows"] if row.get("tokens_per_second")]
    speeds = [row for row in rows if not row["name"].startswith("limit")]
    speeds.sort(key=lambda row: float(row["tokens_per_second"]))
    values = [row["tokens_per_second"] for row in speeds]
    colors = [OURS if "AnyMamba" in row["name"] else OTHERS for row in speeds]
    drawn = axis.barh([row["name"] for row in speeds], values, color=colors)
    axis.bar_label(drawn, [f"{v:.0f}" if v >= 10 else f"{v:.1f}" for v in values], padding=3)
    for row in rows:
        if row["name"].startswith("limit"):
            axis.axvline(row["tokens_per_second"], color=LIMIT, linestyle="--", linewidth=1)
            axis.annotate(
                row["name"].removeprefix("limit: "),
                (row["tokens_per_second"], 0),
                (-3, 2),
                textcoords="offset points",
                rotation=90,
                color=LIMIT,
                fontsize=7,
                horizontalalignment="right",
            )
    axis.set_title(table["title"].partition("(")[0].strip(), fontsize=9)
    axis.margins(x=0.12)
    axis.tick_params(colors=INK)
    axis.spines[["top", "right"]].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(INK)


if __name__ == "__main__":
    sys.exit(main())
