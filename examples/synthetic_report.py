"""Draw the pictures and fill the tables of docs/synthetic-tasks.md from the scripts' JSON files.

    python examples/synthetic_report.py            writes the page and the pictures
    python examples/synthetic_report.py --check    ends with 1 if the page says anything else

The page's words are written by hand; between a line `<!-- figures: NAME -->` and the next
`<!-- end -->` stands what this script wrote.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "synthetic-tasks.md"
INDUCTION = ROOT / "examples" / "induction_heads" / "results"
COPYING = ROOT / "examples" / "selective_copying" / "results" / "full.json"
# Readable on white and on black.
OURS, OTHER, INK = "#d9730d", "#8a94a6", "#7a828e"

Result = dict[str, Any]


def main() -> int:
    """Read the results; write the page and the pictures, or compare the page with them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    filled = fill(page)
    if arguments.check:
        if filled != page:
            print(f"{PAGE.name} differs from the JSON files: run {Path(__file__).name}")
        return int(filled != page)
    PAGE.write_text(filled, encoding="utf-8")
    draw_accuracy_by_length(read(INDUCTION / "full.json"), PAGE.with_name("induction-heads.svg"))
    draw_learning(read(COPYING), PAGE.with_name("selective-copying.svg"))
    return 0


def read(path: Path) -> Result:
    """One result file."""
    result: Result = json.loads(path.read_text(encoding="utf-8"))
    return result


def fill(page: str) -> str:
    """The page with each block of figures replaced by what the result files say now."""

    def replaced(block: re.Match[str]) -> str:
        return f"{block[1]}\n\n{BLOCKS[block[2]]()}\n\n<!-- end -->"

    pattern = r"(<!-- figures: ([a-z-]+) -->).*?<!-- end -->"
    return re.sub(pattern, replaced, page, flags=re.DOTALL)


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    lines = [list(head), *([str(cell) for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(share: float, digits: int = 1) -> str:
    """As in the paper: 99.8 for 0.998."""
    return f"{100 * share:.{digits}f}"


def induction_scores() -> str:
    """Accuracy at each length."""
    result = read(INDUCTION / "full.json")
    return table(
        ["length", "times the training length", "right", "accuracy, %", "seconds so far"],
        (
            (
                f"{score['length']:,}",
                f"{score['length'] / max(result['training_lengths']):g}",
                f"{score['right']} of {score['rows']}",
                percent(score["accuracy"]),
                score["seconds"],
            )
            for score in result["scores"]
        ),
    )


def induction_trials() -> str:
    """The full run beside those that train otherwise."""
    # The full run first, then the same with other seeds.
    first = ("full", "seed-1", "seed-2")
    paths = sorted(INDUCTION.glob("*.json"), key=lambda path: (path.stem not in first, path.stem))
    return table(
        [
            "run",
            "lengths in training",
            "triggers in a row",
            "cost of steps",
            "seed",
            "steps",
            "accuracy at 256, %",
            "every answer right up to length",
        ],
        (trial_row(path.stem, read(path)) for path in paths),
    )


def trial_row(name: str, result: Result) -> list[object]:
    """One line of `induction_trials`."""
    lengths = ", ".join(map(str, result["training_lengths"]))
    most = result["most_triggers"]
    at_256 = next(score["accuracy"] for score in result["scores"] if score["length"] == 256)
    return [
        name,
        lengths,
        f"1 to {most}" if most > 1 else "1",
        f"{result['step_cost']:g}",
        result["seed"],
        f"{result['recipe']['steps']:,}",
        percent(at_256),
        longest_perfect(result["scores"]),
    ]


def longest_perfect(scores: list[dict[str, float]]) -> str:
    """Up to which length no answer was wrong, shorter lengths included."""
    longest = 0
    for score in scores:
        if score["right"] < score["rows"]:
            break
        longest = int(score["length"])
    return f"{longest:,}" if longest else "none"


def copying_scores() -> str:
    """Both models at the length they were trained at."""
    models = read(COPYING)["models"]
    return table(
        ["model", "tokens right, %", "whole sequences right, %", "training, seconds"],
        (
            (
                name,
                percent(model["score"]["accuracy"], 2),
                percent(model["score"]["whole_rows"]),
                f"{model['history'][-1]['seconds']:.0f}",
            )
            for name, model in models.items()
        ),
    )


def copying_setting() -> str:
    """What was trained, in a sentence."""
    result = read(COPYING)
    setting, count = result["setting"], result["setting"]["remembered"]
    length = setting["scattered_over"] + count
    return (
        f"{count} tokens to remember, scattered over {setting['scattered_over']} positions and "
        f"followed by {count} markers: sequences of {length} tokens. {recipe(result)}"
    )


def induction_setting() -> str:
    """What was trained, in a sentence."""
    result = read(INDUCTION / "full.json")
    last = result["history"][-1]
    return f"{recipe(result)} Training took {last['seconds']:.0f} s for {last['tokens']:,} tokens."


def recipe(result: Result) -> str:
    """Recipe, seed and machine."""
    how, machine = result["recipe"], result["machine"]
    return (
        f"{how['steps']:,} steps of about {how['tokens_a_step']:,} tokens, learning rate "
        f"{how['learning_rate']:g}, seed {result['seed']}; {machine['processor']}, "
        f"{machine['cores']} cores shared with other work (load {machine['load_at_the_end']} at "
        f"the end), {machine['threads']} thread."
    )


BLOCKS: dict[str, Callable[[], str]] = {
    "induction-setting": induction_setting,
    "induction-scores": induction_scores,
    "induction-trials": induction_trials,
    "copying-setting": copying_setting,
    "copying-scores": copying_scores,
}


def draw_accuracy_by_length(result: Result, output: Path) -> None:
    """Accuracy against length, and where training ended."""
    figure, axis = canvas()
    scores = result["scores"]
    axis.plot(
        [score["length"] for score in scores],
        [100 * score["accuracy"] for score in scores],
        marker="o",
        color=OURS,
        label="Mamba",
    )
    axis.set_xscale("log", base=2)
    longest = max(result["training_lengths"])
    axis.axvline(longest, color=OTHER, linestyle="--", label="longest in training")
    axis.axhline(100 / 15, color=OTHER, linestyle=":", label="a guess")
    axis.set(xlabel="length of the sequence", ylabel="accuracy, %", ylim=(0, 104))
    save(figure, axis, output, "Induction heads: accuracy at each length of the test.")


def draw_learning(result: Result, output: Path) -> None:
    """Accuracy in training against tokens, for both models."""
    figure, axis = canvas()
    for (name, model), color in zip(result["models"].items(), (OURS, OTHER), strict=True):
        history = model["history"]
        axis.plot(
            [line["tokens"] / 1e6 for line in history],
            [100 * line["accuracy"] for line in history],
            color=color,
            label=name,
        )
    axis.axhline(100 / 14, color=OTHER, linestyle=":", label="a guess")
    axis.set(xlabel="million tokens seen", ylabel="accuracy, %", ylim=(0, 104))
    save(figure, axis, output, "Selective copying: accuracy during training, of both models.")


def canvas() -> tuple[Any, Any]:
    """A figure with one pair of axes."""
    import matplotlib

    matplotlib.use("Agg")
    # The same numbers give the same file.
    colors = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    )
    matplotlib.rcParams.update({"svg.hashsalt": "anymamba", "font.size": 9, **colors})
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(6.4, 3.4), layout="constrained")


def save(figure: Any, axis: Any, output: Path, description: str) -> None:
    """Write the picture, with a description for those who do not see it."""
    axis.legend(frameon=False)
    figure.savefig(output, transparent=True, metadata={"Date": None})
    svg = output.read_text(encoding="utf-8")
    svg = re.sub(r"(<svg[^>]*>)", rf"\1\n <desc>{description}</desc>", svg, count=1)
    lines = [line.rstrip() for line in svg.splitlines()]
    output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
