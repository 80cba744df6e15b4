"""`anymamba convert`: store a model in another layout."""

from __future__ import annotations

import argparse
import json

from anymamba.cli.options.model import add_offline_argument, add_places, places_of
from anymamba.cli.terminal.output import say
from anymamba.cli.terminal.silence import quiet

__all__ = ["add_arguments", "run"]

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `anymamba convert`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    add_places(
        parser,
        "model",
        "SRC is a folder, a GGUF file, or a name on the hub",
        "DST is a new folder, or the file for GGUF",
    )
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        help="default: gguf where DST ends in .gguf, else transformers",
    )
    parser.add_argument(
        "--weights",
        metavar="TYPE",
        help="f32, f16 or bf16, for GGUF also q8_0 or q4_0; default: as they are stored",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    add_offline_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> None:
    """Convert, and say where it is."""
    from anymamba.cli.terminal.sizes import bytes_in, size
    from anymamba.runtime.convert import convert

    source, destination = places_of(arguments)
    is_gguf = destination.lower().endswith(".gguf")
    layout = arguments.layout or ("gguf" if is_gguf else "transformers")
    with quiet():
        written = convert(
            source,
            destination,
            layout,
            arguments.weights,
            overwrite=arguments.overwrite,
            offline=arguments.offline,
        )
    count = bytes_in(written)
    if arguments.json:
        print(json.dumps({"destination": str(written), "layout": layout, "bytes": count}))
    else:
        say(f"{written}: {layout}, {size(count)}")
