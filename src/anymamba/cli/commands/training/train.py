"""`anymamba train`: from texts to a model."""

from __future__ import annotations

import argparse
import json
from dataclasses import Field, fields
from typing import Any

from anymamba.cli.openmp import let_waiting_threads_sleep
from anymamba.cli.options.argument_types import finite
from anymamba.cli.options.training_names import names_of
from anymamba.cli.terminal.silence import quiet

__all__ = ["add_arguments", "run"]

DESCRIPTION = """\
Train a model on text files, folders, JSON lines or a Hugging Face dataset. Every setting is an
option here and a line of the YAML file that --config names; options come first. The end of the
text is held out and tells how well it goes. The output folder gets the model, its tokenizer, all
settings (training.yaml), the metrics (metrics.jsonl) and a curve (loss.png). Checkpoints in it let
--resume go on as if nothing had happened.
"""
EXAMPLES = """\
examples:
  anymamba train --data book.txt --preset tiny --steps 500 --output my-model
  anymamba train --config examples/shakespeare/recipe.yaml --data tinyshakespeare.txt
  anymamba train --output my-model --resume
  anymamba generate "Once" --model my-model

After SIGTERM or Ctrl-C it saves a checkpoint and ends with status 143 or 130.
"""
CONFIG_FILE = "training.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `anymamba train`: those here, and one for each setting."""
    from anymamba.training.settings import PRESETS, Settings

    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument("texts", nargs="*", metavar="DATA", help="the same as --data")
    parser.add_argument("--config", metavar="FILE", help="a YAML file of settings")
    parser.add_argument("--preset", choices=tuple(PRESETS), help="sizes to start from")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    for entry in fields(Settings):
        add_setting(parser, entry)


def add_setting(parser: argparse.ArgumentParser, entry: Field[Any]) -> None:
    """One setting as an option. Its value is checked with all others, so that words are as in
    a file."""
    option = names_of(entry.name)
    text = str(entry.metadata["help"]).replace("%", "%%")
    if entry.metadata.get("many"):
        parser.add_argument(*option, nargs="+", metavar="FILE", help=text)
    elif str(entry.type) == "bool":
        parser.add_argument(*option, action=argparse.BooleanOptionalAction, help=text)
    elif "choices" in entry.metadata:
        parser.add_argument(*option, choices=entry.metadata["choices"], help=text)
    else:
        metavar = "FOLDER" if entry.name in ("output", "model") else "VALUE"
        default = "" if entry.default is None else f"; default {entry.default}"
        parser.add_argument(*option, metavar=metavar, help=text + default)


def run(arguments: argparse.Namespace) -> None:
    """Train, and tell what came of it."""
    from anymamba.errors import MissingDependencyError

    settings = settings_of(arguments)
    let_waiting_threads_sleep()
    with quiet():
        try:
            from anymamba.training.pretrain import train
        except ImportError as error:
            raise MissingDependencyError(
                f"training needs the package {error.name!r}: pip install 'anymamba[train]'"
            ) from error
        outcome = train(
            settings,
            resume=arguments.resume,
            overwrite=arguments.overwrite,
            visible=not arguments.json,
        )
    report(arguments, outcome)


def settings_of(arguments: argparse.Namespace) -> Any:
    """The settings; a run that goes on has those that it began with."""
    from anymamba.checkpoint.io import user_path
    from anymamba.errors import InputError
    from anymamba.training.settings import PRESETS, Settings, settings_from

    flags = {entry.name: getattr(arguments, entry.name) for entry in fields(Settings)}
    flags["data"] = [*arguments.texts, *(arguments.data or [])] or None
    config = arguments.config
    if arguments.resume and config is None:
        kept = user_path(arguments.output or Settings.output, InputError) / CONFIG_FILE
        if not kept.is_file():
            raise InputError(
                f"there is nothing to go on with: {str(kept)!r} is missing; --output names the "
                "folder of the run"
            )
        config = kept
        # The file may have been moved with its folder.
        flags["output"] = str(kept.parent)
        if arguments.preset is not None:
            # It would stand behind the file, and be dropped; so it is refused where it differs.
            named = PRESETS[arguments.preset]
            flags = flags | {name: named[name] for name in named if flags[name] is None}
    return settings_from(config, arguments.preset, **flags)


def report(arguments: argparse.Namespace, outcome: Any) -> None:
    """Print the figures, once for all processes; end as the signal that stopped the run would."""
    from anymamba.cli.terminal.output import say, tell
    from anymamba.cli.terminal.table import table

    if not outcome.first:
        if outcome.stopped_by is not None:
            raise SystemExit(128 + outcome.stopped_by)
        return
    figures = {
        name: finite(value) if isinstance(value, float) else value
        for name, value in outcome.figures.items()
    }
    stopped = outcome.stopped_by
    if arguments.json:
        name = None if stopped is None else stopped.name
        print(json.dumps({"output": str(outcome.folder), **figures, "stopped_by": name}))
    elif stopped is None:
        say(table([("written", outcome.folder), *figures.items()]))
    if figures.get("picture") is False and not arguments.json:
        tell("anymamba: no loss.png, because matplotlib is missing: pip install 'anymamba[train]'")
    if stopped is not None:
        tell(
            f"anymamba: stopped by {stopped.name} after step {figures['steps']}; a checkpoint is "
            f"saved, go on with: anymamba train --output {outcome.folder} --resume"
        )
        raise SystemExit(128 + stopped)
