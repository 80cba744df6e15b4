"""`anymamba models`: list checkpoints on the hub to begin with."""

from __future__ import annotations

from dataclasses import dataclass

from anymamba.cli.describe.known_models import KNOWN_MODELS, KnownModel
from anymamba.cli.options.fields import flag
from anymamba.cli.terminal.output import json_line, say
from anymamba.cli.terminal.sizes import size
from anymamba.cli.terminal.table import columns

DESCRIPTION = """\
List checkpoints on the Hugging Face hub that have Mamba's architecture: base models, which continue
a text, and chat-tuned ones; with their size, their licence, the memory that the weights take in
each type, and what to type to try one. Names and licences are from the models' public cards, sizes
from the cards and the paper; memory is computed from them. None of these checkpoints was run where
this list was made. A model of your own works as well, if it is a Mamba.
"""
EXAMPLES = """\
examples:
  anymamba models
  anymamba download state-spaces/mamba-130m-hf
  anymamba generate "Mamba is" -m state-spaces/mamba-130m-hf
"""
TYPES = ("f32", "bf16", "int8", "int4")


@dataclass(frozen=True)
class Options:
    """What `anymamba models` is asked for."""

    json: bool = flag("--json", "print one JSON object")


def run(options: Options) -> None:
    """Print the list."""
    if options.json:
        print(json_line({"models": [facts_of(model) for model in KNOWN_MODELS]}))
        return
    say(columns([("model", "use", "size", "licence", *TYPES), *map(row_of, KNOWN_MODELS)]))
    for model in KNOWN_MODELS:
        say("\n" + model.name + (f": {model.note}" if model.note else ""))
        say(f"  {model.command()}")
    say("\nFrom the models' public cards; none was run where this list was made.")


def row_of(model: KnownModel) -> tuple[str, ...]:
    """One line of the table."""
    millions = model.parameters / 1e6
    count = f"{millions:.0f} M" if millions < 1000 else f"{millions / 1000:.1f} B"
    memory = (size(model.weight_bytes(weights)) for weights in TYPES)
    return (model.name, model.use, count, model.licence, *memory)


def facts_of(model: KnownModel) -> dict[str, object]:
    """The same for programs."""
    return {
        "model": model.name,
        "use": model.use,
        "parameters": model.parameters,
        "licence": model.licence,
        "weight_bytes": {weights: model.weight_bytes(weights) for weights in TYPES},
        "note": model.note,
        "command": model.command(),
        "run_here": False,
    }
