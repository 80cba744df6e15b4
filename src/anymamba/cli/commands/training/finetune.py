"""`anymamba finetune`: train a model further, or an adapter of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anymamba.cli.commands.evaluation.evaluate import network_allowed
from anymamba.cli.openmp import let_waiting_threads_sleep
from anymamba.cli.options.fields import flag, integer_option, offline_flag, option, settings
from anymamba.cli.terminal.output import json_line, say
from anymamba.cli.terminal.silence import silence
from anymamba.errors import MissingDependencyError
from anymamba.training.finetune.settings import FinetuneSettings
from anymamba.training.settings import MOST

DESCRIPTION = """\
Train a model further on examples: an adapter of it (LoRA, or DoRA), which is small and leaves the
model as it is, or with --method full all of its weights. DATA are JSON lines with "messages", with
"prompt" and "completion", or with "text"; or text files and folders of them. Of conversations and
prompts only the answers count. The adapter is written in PEFT's format, with the tokenizer.
"""
EXAMPLES = """\
examples:
  anymamba finetune talk.jsonl --output ./my-adapter --model state-spaces/mamba-130m-hf
  anymamba generate "Q: 2+2?" --adapter ./my-adapter
  anymamba merge ./my-adapter ./my-model
  anymamba finetune plays.txt --output ./my-model --method full --learning-rate 1e-4
"""


@dataclass(frozen=True)
class Options:
    """What `anymamba finetune` is asked for."""

    data: Sequence[str] = option(nargs="*", metavar="DATA", help="JSON lines, texts, or folders")
    more_data: Sequence[str] = option(
        "--data", nargs="+", default=[], metavar="FILE", help="DATA by name"
    )
    dataset: str | None = option(
        "--dataset", metavar="NAME", help="a Hugging Face dataset in place of DATA; same fields"
    )
    dataset_config: str | None = option(
        "--dataset-config", metavar="NAME", help="which of the dataset's configurations"
    )
    dataset_split: str = option(
        "--dataset-split", default="train", metavar="NAME", help="which split; default train"
    )
    output: str = option("--output", "-o", required=True, metavar="DST", help="the folder to write")
    model: str | None = option(
        *("--model", "-m"),
        metavar="FOLDER",
        help="a folder or a name on the hub (default: the bundled one)",
    )
    validation: Sequence[str] = option(
        *("--validation-data", "--validation"),
        nargs="+",
        default=[],
        metavar="FILE",
        help="examples to measure the loss on, before and after",
    )
    save_every: int | None = integer_option(
        "--save-every",
        high=MOST,
        help="keep checkpoints every N steps in DST.checkpoints, until all is done",
    )
    resume: bool = flag("--resume", "go on from the last checkpoint")
    overwrite: bool = flag("--overwrite", "replace what is there")
    offline: bool = offline_flag()
    json: bool = flag("--json", "print one JSON object")
    given: Mapping[str, Any] = settings(FinetuneSettings)


def run(options: Options) -> None:
    """Train, and tell how it went."""
    from anymamba.cli.terminal.progress import Steps

    chosen = settings_of(options)
    let_waiting_threads_sleep()
    with silence(), network_allowed(not options.offline):
        finetune = import_finetune()  # which reads whether the network may be asked
    with silence(), Steps("steps", visible=not options.json) as steps:
        figures = finetune(
            [*options.data, *options.more_data],
            options.output,
            options.model,
            chosen,
            dataset=options.dataset,
            dataset_config=options.dataset_config,
            dataset_split=options.dataset_split,
            validation=options.validation,
            save_every=options.save_every,
            resume=options.resume,
            overwrite=options.overwrite,
            offline=options.offline,
            progress=steps.show,
        )
    report(options, figures)


def import_finetune() -> Callable[..., dict[str, Any]]:
    """The function that trains; the libraries below are kept from drawing on standard error."""
    try:
        import datasets
        import peft  # noqa: F401
        import trl  # noqa: F401
        from transformers.utils import logging

        from anymamba.training.finetune import finetune
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"`anymamba finetune` needs the package {error.name!r}, which is not installed: "
            "pip install 'anymamba[train]'"
        ) from error
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    return finetune


def settings_of(options: Options) -> FinetuneSettings:
    """The settings that the options name."""
    from anymamba.cli.text.files import read_text

    given = {**options.given}
    if "chat_template" in given:
        given["chat_template"] = read_text(given["chat_template"])
    return FinetuneSettings(**given)


def report(options: Options, figures: dict[str, Any]) -> None:
    """Print the figures."""
    from anymamba.cli.terminal.table import table

    if options.json:
        print(json_line(figures))
        return
    share = figures["trained_parameters"] / figures["parameters"]
    steps = f"{figures['steps']} in {figures['seconds']} s, {figures['examples']} examples"
    if figures["stopped_by"] != "end":
        steps += f", ended by {figures['stopped_by']}"
    rows: list[tuple[str, object]] = [
        ("written", figures["destination"]),
        ("trained", f"{figures['trained_parameters']:,} parameters, {share:.2%} of all"),
        ("steps", steps),
    ]
    if figures["loss_first"] is not None:
        rows.append(("loss", f"{figures['loss_first']:.4f} first, {figures['loss_last']:.4f} last"))
    if "validation_after" in figures:
        before, after = figures["validation_before"], figures["validation_after"]
        rows.append(("validation", f"{before:.4f} before, {after:.4f} after"))
    say(table(rows))
