"""The picture of an inspection as a page for a browser, in one file that needs nothing else.

The text stands there once for each layer, each token on a colour: pale is little, dark is much. The
number is told where the pointer rests.
"""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from anymamba.cli.inspection.result import Inspected

STYLE = """\
body { font: 16px/1.5 sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em;
  color: #222; background: #fff; }
th { text-align: right; vertical-align: top; padding-right: 0.8em; font-weight: normal;
  color: #666; white-space: nowrap; }
td { font-family: monospace; word-break: break-all; padding-bottom: 0.3em; }
.curve td { text-align: right; padding: 0.1em 0.6em; }
b { font-weight: normal; padding: 0.1em 0; }
"""
BLUE, RED, GREEN = (31, 90, 180), (190, 60, 30), (20, 120, 60)
Colour = tuple[int, int, int]


def page_of(inspected: Inspected) -> str:
    """Draw the step sizes, what is left of each token, the last state, and forgetting by age."""
    found = inspected.found
    model = html.escape(inspected.model)
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f"<title>What selection does ({model})</title><style>{STYLE}</style></head><body>",
        f"<h1>What selection does, layer by layer</h1><p>Model: {model}. Each row is the text as "
        "one layer reads it; dark is much. Rest the pointer on a token to see its number.</p>",
        "<h2>Step size Δ: how long the layer's clock runs at each token</h2>",
        map_of(inspected, np.log(found.step_sizes_yl), BLUE, found.step_sizes_yl, "{:.4f}"),
        f"<h2>What is left of each token {inspected.after} tokens later, times the average</h2>",
        map_of(inspected, found.held_yl(inspected.after), RED, None, "{:.2f} times"),
        "<h2>What the state at the text's end is made of</h2>",
        map_of(inspected, np.sqrt(found.final_share_yl), GREEN, found.final_share_yl, "{:.2%}"),
        "<h2>How much of what was written is left</h2>",
        curves_of(inspected),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def map_of(
    inspected: Inspected,
    values_yl: NDArray[np.float64],
    colour: Colour,
    shown_yl: NDArray[np.float64] | None,
    form: str,
) -> str:
    """The text, a row a layer. The larger a token's value, the darker it is; `shown_yl` has the
    number that is told of it, if that is another than the value."""
    low, high = np.nanmin(values_yl), np.nanmax(values_yl)
    shades_yl = (values_yl - low) / (high - low if high > low else 1.0)
    rows = []
    for layer, numbers_l in enumerate(values_yl if shown_yl is None else shown_yl):
        cells = zip(inspected.names, shades_yl[layer], numbers_l, strict=True)
        text = "".join(cell(name, shade, colour, form.format(n)) for name, shade, n in cells)
        rows.append(f"<tr><th>layer {layer}</th><td>{text}</td></tr>")
    return "<table>\n" + "\n".join(rows) + "\n</table>"


def cell(name: str, shade: float, colour: Colour, number: str) -> str:
    """One token on its colour; without one where nothing is known of it."""
    escaped = html.escape(name)
    if np.isnan(shade):
        return f'<b title="the text ends too soon to tell">{escaped}</b>'
    return f'<b title="{escaped}: {number}" style="{fill(float(shade), colour)}">{escaped}</b>'


def curves_of(inspected: Inspected) -> str:
    """A row a layer, a column an age."""
    ages = inspected.found.ages
    head = "".join(f"<th>{age} later</th>" for age in ages)
    rows = [f"<tr><th></th>{head}</tr>"]
    for layer, left_a in enumerate(inspected.found.forgetting_ya()):
        cells = "".join(f'<td style="{fill(float(s), BLUE)}">{s:.1%}</td>' for s in left_a)
        rows.append(f"<tr><th>layer {layer}</th>{cells}</tr>")
    return '<table class="curve">\n' + "\n".join(rows) + "\n</table>"


def fill(shade: float, colour: Colour) -> str:
    """The colour in a shade from 0 to 1, with a text on it that can be read."""
    red, green, blue = colour
    text = ";color:#fff" if shade > 0.55 else ""
    return f"background:rgba({red},{green},{blue},{0.9 * shade:.2f}){text}"
