"""`anymamba score --by-position`: the loss by how much was read before, and whether more helps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from anymamba.cli.load_engine import beginning_tokens, model_name, open_engine
from anymamba.cli.options.fields import flag, integer_option, option
from anymamba.cli.options.model import AdapterOptions, EngineOptions
from anymamba.cli.terminal.output import json_line, say
from anymamba.cli.terminal.silence import silence
from anymamba.errors import InputError

if TYPE_CHECKING:
    from anymamba.runtime.analysis import Stretch

DEFAULT_WINDOW = 1024
GROUP = ("loss by position",)


@dataclass(frozen=True)
class PositionOptions(AdapterOptions, EngineOptions):
    """`--by-position`, and what belongs to it."""

    by_position: bool = flag(
        "--by-position",
        "measure the loss by how many tokens were read before, in windows that each begin with an "
        "empty state",
        group=GROUP,
    )
    window: int | None = integer_option(
        "--window", low=2, help=f"their length; default {DEFAULT_WINDOW}", group=GROUP
    )
    stride: int | None = integer_option(
        "--stride",
        help="begin a window every N tokens (default: where the last one ended): each token is "
        "then predicted from several lengths of context, so that small gains show; takes longer",
        group=GROUP,
    )
    json: bool = flag("--json", "print one JSON object")
    plot: str | None = option(
        "--plot",
        metavar="FILE",
        help="draw it, as .png or .svg; needs: pip install matplotlib",
        group=GROUP,
    )


def refuse_alone(options: PositionOptions) -> None:
    """Refuse what has no meaning without `--by-position`."""
    for name in ("window", "stride", "plot"):
        if getattr(options, name) is not None:
            raise InputError(f"--{name} belongs to --by-position: give both")


def run_by_position(options: PositionOptions, text: str) -> None:
    """Score the windows, draw, and print."""
    from anymamba.checkpoint.io import write_atomically
    from anymamba.cli.terminal.plot_file import check_picture
    from anymamba.cli.terminal.progress import Steps
    from anymamba.runtime.analysis import helpful_context, loss_by_position

    plot = None
    if options.plot is not None:
        plot = check_picture(options.plot, drawn=[".png", ".svg"])
    window = options.window or DEFAULT_WINDOW
    with silence():
        engine = open_engine(options)
        ids = engine.tokenize(text, special=False)
        with Steps("windows", visible=not options.json) as steps:
            stretches = loss_by_position(
                engine, ids, window, options.stride, beginning_tokens(engine), steps.show
            )
        helpful = helpful_context(stretches)
        if plot is not None:
            drawn = figure_of(stretches, helpful, plot.suffix[1:])
            write_atomically(plot, lambda place: place.write_bytes(drawn))
    if options.json:
        facts = {"model": model_name(options), "weights": engine.weight_type, "window": window}
        facts |= {"stride": options.stride or window, "helpful_context": helpful}
        print(json_line(facts | {"stretches": [asdict(part) for part in stretches]}))
        return
    say(as_text(stretches, helpful))


def as_text(stretches: Sequence[Stretch], helpful: int) -> str:
    """A table, and what it says."""
    from anymamba.cli.terminal.table import columns

    rows = [["tokens before", "nats per token", "", "gain", "", "predictions"]]
    rows += [
        [
            f"{part.first} to {part.last}" if part.last > part.first else str(part.first),
            f"{part.nats_per_token:.4f}",
            margin(part.error),
            "" if part.gain is None else f"{part.gain:.4f}",
            margin(part.gain_error),
            f"{part.tokens:,}",
        ]
        for part in stretches
    ]
    return f"{columns(rows)}\n\n{in_words(stretches, helpful)}"


def in_words(stretches: Sequence[Stretch], helpful: int) -> str:
    """How far context helps, said plainly."""
    last = stretches[-1].last
    if helpful == 0:
        return "no gain from context is larger than two standard errors: take a longer text"
    if helpful == last:
        return f"more context helps all the way to {last:,} tokens: a longer --window may show more"
    return f"context helps up to {helpful:,} tokens; from there to {last:,} no gain is sure"


def margin(error: float | None) -> str:
    """A standard error."""
    return "" if error is None else f"± {error:.4f}"


def figure_of(stretches: Sequence[Stretch], helpful: int, kind: str) -> bytes:
    """Draw the loss over the tokens before, with its standard errors."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    middles = [(part.first + part.last) / 2 for part in stretches]
    losses = [part.nats_per_token for part in stretches]
    errors = [part.error or 0.0 for part in stretches]
    axes.errorbar(middles, losses, yerr=errors, marker="o", markersize=4, capsize=3)
    axes.set_xscale("symlog", base=2, linthresh=1)
    ticks = [part.first for part in stretches]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=45)
    axes.minorticks_off()
    if helpful:
        axes.axvline(helpful, color="grey", linestyle=":", label=f"helps up to {helpful:,}")
        axes.legend()
    axes.set_xlabel("tokens read before")
    axes.set_ylabel("nats per token")
    axes.set_title("loss by position, with standard errors", loc="left", fontsize=10)
    axes.grid(alpha=0.3)
    stream = io.BytesIO()
    figure.savefig(stream, format=kind)
    return stream.getvalue()
