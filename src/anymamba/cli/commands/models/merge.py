"""`anymamba merge`: store a model with an adapter merged into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anymamba.cli.options.fields import option
from anymamba.cli.options.places import Places, places_of
from anymamba.cli.terminal.output import json_line, say
from anymamba.cli.terminal.silence import silence

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


@dataclass(frozen=True)
class Options(Places):
    """What `anymamba merge` is asked for."""

    places: Sequence[str] = option(
        nargs="*",
        metavar="SRC DST",
        help="SRC is the adapter, as PEFT writes it; DST is a new folder",
    )
    source: str | None = option("--adapter", "-a", metavar="FOLDER", help="SRC by name")
    model: str | None = option(
        *("--model", "-m"),
        metavar="FOLDER",
        help="the model: a folder, a GGUF file, or a name on the hub (default: the adapter's own)",
    )
    weights: str | None = option(
        "--weights", choices=("f32", "f16", "bf16"), help="default: as the model's are stored"
    )


def run(options: Options) -> None:
    """Merge, and say where it is."""
    from anymamba.cli.terminal.sizes import bytes_in, size
    from anymamba.runtime.convert import merge

    adapter, destination = places_of(options)
    with silence():
        written = merge(
            adapter,
            destination,
            options.model,
            options.weights,
            overwrite=options.overwrite,
            offline=options.offline,
        )
    count = bytes_in(written)
    facts = {"destination": str(written), "bytes": count}
    say(json_line(facts) if options.json else f"{written}: merged, {size(count)}")
