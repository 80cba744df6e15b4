"""`anymamba merge`: store a model with an adapter merged into it."""

from __future__ import annotations

import argparse
import json

from anymamba.cli.options.model import add_offline_argument, add_places, places_of
from anymamba.cli.terminal.output import say
from anymamba.cli.terminal.silence import quiet

__all__ = ["add_arguments", "run"]

DESCRIPTION = """\
Merge a LoRA or DoRA adapter into the model that it was trained on, and store the result as an
ordinary model, in Transformers' layout. The sums are made in float32 and rounded once, to the type
in which the model's weights are stored. An adapter of a tied embedding table unties the head.
"""
EXAMPLES = """\
examples:
  anymamba merge ./my-adapter ./my-model
  anymamba merge ./my-adapter ./my-model --model state-spaces/mamba-130m-hf --weights bf16
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `anymamba merge`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    add_places(parser, "adapter", "SRC is the adapter, as PEFT writes it", "DST is a new folder")
    parser.add_argument(
        "--model",
        "-m",
        metavar="FOLDER",
        help="the model: a folder, a GGUF file, or a name on the hub (default: the adapter's own)",
    )
    parser.add_argument(
        "--weights", choices=("f32", "f16", "bf16"), help="default: as the model's are stored"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    add_offline_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> None:
    """Merge, and say where it is."""
    from anymamba.cli.terminal.sizes import bytes_in, size
    from anymamba.runtime.convert import merge

    adapter, destination = places_of(arguments)
    with quiet():
        written = merge(
            adapter,
            destination,
            arguments.model,
            arguments.weights,
            overwrite=arguments.overwrite,
            offline=arguments.offline,
        )
    count = bytes_in(written)
    if arguments.json:
        print(json.dumps({"destination": str(written), "bytes": count}))
    else:
        say(f"{written}: merged, {size(count)}")
