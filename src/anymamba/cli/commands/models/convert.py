"""`anymamba convert`: store a model in another layout."""

from __future__ import annotations

from dataclasses import dataclass

from anymamba.cli.options.fields import option
from anymamba.cli.options.places import Places, places_of
from anymamba.cli.terminal.output import json_line, say
from anymamba.cli.terminal.silence import silence

DESCRIPTION = """\
Store a model in another layout: Transformers' (the default), the authors' original one, that of
minimal.py, or a GGUF file. SRC is a folder in any layout, a GGUF file or a name on the hub.
Values stay what they are unless --weights asks for another type. Pickled weights are read with
PyTorch, once; nothing in them is run.
"""
EXAMPLES = """\
examples:
  anymamba convert state-spaces/mamba-130m ./mamba-130m
  anymamba convert ./my-model my-model.gguf --layout gguf --weights f16
  anymamba convert model.gguf ./my-model
"""
LAYOUTS = ("transformers", "original", "minimal", "gguf")


@dataclass(frozen=True)
class Options(Places):
    """What `anymamba convert` is asked for."""

    layout: str | None = option(
        "--layout", choices=LAYOUTS, help="default: gguf where DST ends in .gguf, else transformers"
    )
    weights: str | None = option(
        "--weights",
        metavar="TYPE",
        help="f32, f16 or bf16, for GGUF also q8_0 or q4_0; default: as they are stored",
    )


def run(options: Options) -> None:
    """Convert, and say where it is."""
    from anymamba.cli.terminal.sizes import bytes_in, size
    from anymamba.runtime.convert import convert

    source, destination = places_of(options)
    is_gguf = destination.lower().endswith(".gguf")
    layout = options.layout or ("gguf" if is_gguf else "transformers")
    with silence():
        written = convert(
            source,
            destination,
            layout,
            options.weights,
            overwrite=options.overwrite,
            offline=options.offline,
        )
    count = bytes_in(written)
    facts = {"destination": str(written), "layout": layout, "bytes": count}
    say(json_line(facts) if options.json else f"{written}: {layout}, {size(count)}")
