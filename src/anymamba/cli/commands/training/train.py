"""`anymamba train`: from texts to a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anymamba.cli.openmp import let_waiting_threads_sleep
from anymamba.cli.options.fields import flag, option, settings
from anymamba.cli.terminal.silence import silence
from anymamba.training.settings import PRESETS, Settings, settings_from

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


@dataclass(frozen=True)
class Options:
    """What `anymamba train` is asked for."""

    texts: Sequence[str] = option(nargs="*", metavar="DATA", help="the same as --data")
    config: str | None = option("--config", metavar="FILE", help="a YAML file of settings")
    preset: str | None = option("--preset", choices=tuple(PRESETS), help="sizes to start from")
    resume: bool = flag("--resume", "go on from the last checkpoint")
    overwrite: bool = flag("--overwrite", "replace an earlier run")
    json: bool = flag("--json", "print one JSON object")
    given: Mapping[str, Any] = settings(Settings)


def run(options: Options) -> None:
    """Train, and tell what came of it."""
    from anymamba.errors import MissingDependencyError

    chosen = settings_of(options)
    let_waiting_threads_sleep()
    with silence():
        try:
            from anymamba.training.pretrain import train
        except ImportError as error:
            raise MissingDependencyError(
                f"training needs the package {error.name!r}: pip install 'anymamba[train]'"
            ) from error
        outcome = train(
            chosen, resume=options.resume, overwrite=options.overwrite, visible=not options.json
        )
    report(options, outcome)


def settings_of(options: Options) -> Settings:
    """The settings; a run that goes on has those that it began with."""
    from anymamba.checkpoint.io import user_path
    from anymamba.errors import InputError

    flags = {**options.given}
    if options.texts:
        flags["data"] = [*options.texts, *flags.get("data", [])]
    config: str | Path | None = options.config
    if options.resume and config is None:
        kept = user_path(flags.get("output", Settings.output), InputError) / CONFIG_FILE
        if not kept.is_file():
            raise InputError(
                f"there is nothing to go on with: {str(kept)!r} is missing; --output names the "
                "folder of the run"
            )
        config = kept
        # The file may have been moved with its folder.
        flags["output"] = str(kept.parent)
        if options.preset is not None:
            # It would stand behind the file, and be dropped; so it is refused where it differs.
            flags = {**PRESETS[options.preset], **flags}
    return settings_from(config, options.preset, **flags)


def report(options: Options, outcome: Any) -> None:
    """Print the figures, once for all processes; end as the signal that stopped the run would."""
    from anymamba.cli.terminal.output import json_line, say, tell
    from anymamba.cli.terminal.table import table

    if not outcome.first:
        if outcome.stopped_by is not None:
            raise SystemExit(128 + outcome.stopped_by)
        return
    figures, stopped = outcome.figures, outcome.stopped_by
    if options.json:
        name = None if stopped is None else stopped.name
        print(json_line({"output": str(outcome.folder), **figures, "stopped_by": name}))
    elif stopped is None:
        say(table([("written", outcome.folder), *figures.items()]))
    if figures.get("picture") is False and not options.json:
        tell("anymamba: no loss.png, because matplotlib is missing: pip install 'anymamba[train]'")
    if stopped is not None:
        tell(
            f"anymamba: stopped by {stopped.name} after step {figures['steps']}; a checkpoint is "
            f"saved, go on with: anymamba train --output {outcome.folder} --resume"
        )
        raise SystemExit(128 + stopped)
