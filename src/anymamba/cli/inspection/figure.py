"""The picture of an inspection as PNG, drawn with matplotlib."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from anymamba.cli.inspection.result import Inspected

INCHES_A_TOKEN = 0.13
MOST_NAMES = 300  # of more tokens the names would lie on one another


def figure_of(inspected: Inspected) -> bytes:
    """Draw three maps of layers by tokens, and the curves of forgetting, as a PNG."""
    # The classes rather than pyplot, which would look for a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    found = inspected.found
    width = min(max(9.0, INCHES_A_TOKEN * len(inspected.names) + 2), 40.0)
    height = 2 + 0.22 * len(found.step_sizes_yl)
    figure = Figure(figsize=(width, 3 * height + 3.5), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    steps, held, final, curves = figure.subplots(
        4, 1, gridspec_kw={"height_ratios": [height, height, height, 3.5]}
    )
    figure.suptitle(f"What selection does, layer by layer (model: {inspected.model})")
    draw_map(
        steps,
        inspected,
        found.step_sizes_yl,
        "step size Δ: how long the layer's clock runs at each token",
        norm=LogNorm(),
        cmap="viridis",
    )
    draw_map(
        held,
        inspected,
        found.held_yl(inspected.after),
        f"what is left of each token {inspected.after} tokens later, times the average",
        norm=LogNorm(vmin=0.25, vmax=4, clip=True),
        cmap="coolwarm",
    )
    draw_map(
        final,
        inspected,
        100 * found.final_share_yl,
        "what the state at the text's end is made of, percent",
        norm=LogNorm(vmin=0.01, clip=True),
        cmap="cividis",
    )
    draw_curves(curves, inspected)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def draw_map(
    axes: Axes, inspected: Inspected, values_yl: NDArray[np.float64], title: str, **style: Any
) -> None:
    """A row a layer, a column a token."""
    from matplotlib.ticker import LogLocator, NullLocator

    image = axes.imshow(values_yl, aspect="auto", interpolation="nearest", **style)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_ylabel("layer")
    axes.set_yticks(range(len(values_yl)))
    if len(inspected.names) <= MOST_NAMES:
        # A dollar sign would begin a formula.
        names = [name.replace("$", r"\$") for name in inspected.names]
        rotation = 0 if max(map(len, names)) == 1 else 90
        axes.set_xticks(range(len(names)), names, fontsize=7, rotation=rotation)
    axes.tick_params(length=0)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.01)
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # rather than powers of ten


def draw_curves(axes: Axes, inspected: Inspected) -> None:
    """How much is left of what was written, by age, a curve a layer."""
    from matplotlib import colormaps

    ages = inspected.found.ages[1:]
    forgetting = inspected.found.forgetting_ya()[:, 1:]
    for layer, left in enumerate(forgetting):
        color = colormaps["plasma"](0.9 * layer / max(1, len(forgetting) - 1))
        few = len(forgetting) <= 12 or layer in (0, len(forgetting) - 1)
        label = f"layer {layer}" if few else None
        axes.plot(ages, 100 * left, marker="o", markersize=3, color=color, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ages, [str(age) for age in ages])
    axes.minorticks_off()
    axes.set_ylim(0, 100)
    axes.set_xlabel("tokens later")
    axes.set_title("how much of what was written is left, percent", loc="left", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
