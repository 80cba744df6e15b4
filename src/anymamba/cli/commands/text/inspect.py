"""`anymamba inspect`: what selection does with a text, in figures and as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anymamba.cli.load_engine import model_name, open_engine
from anymamba.cli.options.fields import flag, integer_option, option
from anymamba.cli.options.model import EngineOptions
from anymamba.cli.terminal.output import json_line, say
from anymamba.cli.terminal.silence import silence
from anymamba.errors import InputError

if TYPE_CHECKING:
    from anymamba.cli.inspection.result import Inspected

DESCRIPTION = """\
Show what selection does with a text: how long each token lets a layer's clock run (the step size
Delta), how much of what a token writes into the state is left some tokens later, and which tokens
the model holds on to. Writes a picture: a PNG where matplotlib is installed, else a page for a
browser, which needs nothing. docs/inspect.md explains what is to be seen.
"""
EXAMPLES = """\
examples:
  anymamba inspect "ROMEO: But, soft! what light through yonder window breaks?"
  anymamba inspect "ROMEO: But, soft!" --after 4 --picture romeo.html
  anymamba inspect --model ./my-model --json < text.txt
"""

MOST_TOKENS = 4096
MOST_HELD = 10
DEFAULT_AFTER = 16


@dataclass(frozen=True)
class Options(EngineOptions):
    """What `anymamba inspect` is asked for."""

    text: str | None = option(
        nargs="?", metavar="TEXT", help="the text (default: from standard input)"
    )
    after: int | None = integer_option(
        "--after",
        help="look at what is left N tokens later "
        f"(default {DEFAULT_AFTER}, of a short text a quarter of its length)",
    )
    picture: str | None = option(
        "--picture",
        metavar="FILE",
        help="write this file, which ends in .png or .html, and replace what is there (default: "
        "inspection.png, or inspection.html without matplotlib; with --json none)",
    )
    json: bool = flag("--json", "print one JSON object")


def run(options: Options) -> None:
    """Look, draw, and print."""
    from anymamba.checkpoint.io import write_atomically
    from anymamba.cli.text.prompt import prompt_from

    picture = picture_file(options)
    text = prompt_from(options.text)
    with silence():
        inspected = look(options, text)
        if picture is not None:
            drawing = drawing_of(inspected, picture)
            write_atomically(picture, lambda place: place.write_bytes(drawing))
    if options.json:
        facts = {"model": model_name(options), "picture": picture and str(picture)}
        print(json_line(facts | inspected.as_json()))
        return
    say(as_text(inspected))
    say(f"\npicture: {picture}")


def look(options: Options, text: str) -> Inspected:
    """Let the model read the text."""
    from anymamba.cli.inspection.result import Inspected, names_of
    from anymamba.cli.terminal.progress import Steps
    from anymamba.runtime.analysis import inspect

    engine = open_engine(options)
    ids = engine.tokenize(text)
    if not 2 <= len(ids) <= MOST_TOKENS:
        raise InputError(
            f"expected a text of 2 to {MOST_TOKENS:,} tokens, got {len(ids):,}: a picture shows "
            "no more, and of one token nothing is left later"
        )
    after = options.after or max(1, min(DEFAULT_AFTER, len(ids) // 4))
    with Steps("layers", visible=not options.json) as steps:
        found = inspect(engine, ids, [after], steps.show)
    return Inspected(found, names_of(engine, ids), after, model_name(options))


def picture_file(options: Options) -> Path | None:
    """Where the picture goes; a mistake shows before anything is computed."""
    from anymamba.cli.terminal.plot_file import check_picture

    if options.json and options.picture is None:
        return None
    drawn = find_spec("matplotlib") is not None
    name = options.picture or ("inspection.png" if drawn else "inspection.html")
    return check_picture(name, drawn=[".png"], written=[".html"])


def drawing_of(inspected: Inspected, file: Path) -> bytes:
    """The picture, in the format that the file's name says."""
    if file.suffix == ".html":
        from anymamba.cli.inspection.page import page_of

        return page_of(inspected).encode()
    from anymamba.cli.inspection.figure import figure_of

    return figure_of(inspected)


def as_text(inspected: Inspected) -> str:
    """The figures for people: forgetting, layer by layer, and the tokens that stay."""
    from anymamba.cli.terminal.table import columns

    found = inspected.found
    ages = [index for index, age in enumerate(found.ages) if age]
    forgetting = found.forgetting_ya()
    rows: list[list[str]] = [["layer", "step size", *(f"{found.ages[i]} later" for i in ages)]]
    for layer, step_sizes in enumerate(found.step_sizes_yl):
        shares = [f"{forgetting[layer, index]:.1%}" for index in ages]
        rows.append([str(layer), f"{step_sizes.mean():.4f}", *shares])
    held: list[list[Any]] = [["held on to", "times the average"]]
    for place, factor in inspected.most_held(MOST_HELD):
        held.append([inspected.in_context(place), f"{factor:.2f}"])
    return (
        f"what is left of what was written into the state\n{columns(rows)}\n\n"
        f"tokens of which most is left {inspected.after} tokens later\n{columns(held)}"
    )
