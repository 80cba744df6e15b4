"""`anymamba finetune`: train a model further, or an adapter of it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from anymamba.cli.commands.evaluation.evaluate import network_allowed
from anymamba.cli.openmp import let_waiting_threads_sleep
from anymamba.cli.options.argument_types import integer, number
from anymamba.cli.options.model import add_offline_argument
from anymamba.cli.options.training_names import names_of
from anymamba.cli.terminal.output import say
from anymamba.cli.terminal.silence import quiet
from anymamba.errors import MissingDependencyError

__all__ = ["add_arguments", "run"]

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
HIGHEST_SEED = 2**32 - 1
MOST = 2**31 - 1
METHODS = ("lora", "dora", "full")
TARGETS = ("x_proj", "embeddings", "in_proj", "out_proj")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `anymamba finetune`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument("data", nargs="*", metavar="DATA", help="JSON lines, texts, or folders")
    parser.add_argument(
        "--data", dest="more_data", nargs="+", default=[], metavar="FILE", help="DATA by name"
    )
    parser.add_argument(
        "--dataset", metavar="NAME", help="a Hugging Face dataset in place of DATA; same fields"
    )
    parser.add_argument(
        "--dataset-config", metavar="NAME", help="which of the dataset's configurations"
    )
    parser.add_argument(
        "--dataset-split", default="train", metavar="NAME", help="which split; default train"
    )
    parser.add_argument(
        *names_of("output"), required=True, metavar="DST", help="the folder to write"
    )
    parser.add_argument(
        *names_of("model"),
        metavar="FOLDER",
        help="a folder or a name on the hub (default: the bundled one)",
    )
    parser.add_argument(
        "--text-field",
        metavar="NAME",
        help="the field of JSON and datasets that has the text to train on",
    )
    parser.add_argument(
        *names_of("validation_data"),
        dest="validation",
        nargs="+",
        default=[],
        metavar="FILE",
        help="examples to tell the loss on",
    )
    parser.add_argument(
        "--save-every",
        type=integer(1, MOST),
        metavar="N",
        help="keep checkpoints every N steps in DST.checkpoints, until all is done",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    add_offline_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_adapter_settings(parser)
    add_training_settings(parser)


def add_adapter_settings(parser: argparse.ArgumentParser) -> None:
    """Declare what is trained."""
    group = parser.add_argument_group("what is trained")
    group.add_argument("--method", choices=METHODS, default="lora", help="default lora")
    group.add_argument("--rank", type=integer(1, MOST), default=16, metavar="N", help="default 16")
    group.add_argument(
        "--alpha", type=number(0, MOST, above_low=True), metavar="X", help="default: twice the rank"
    )
    group.add_argument(
        "--targets",
        nargs="+",
        default=TARGETS,
        metavar="NAME",
        help=f"default {' '.join(TARGETS)}; also dt_proj",
    )
    group.add_argument("--rslora", action="store_true", help="scale by the rank's square root")
    group.add_argument(
        "--adapter-dropout", type=number(0, 0.99), default=0.0, metavar="X", help="default 0"
    )


def add_training_settings(parser: argparse.ArgumentParser) -> None:
    """Declare how it is trained."""
    group = parser.add_argument_group("how")
    positive, count = number(0, MOST, above_low=True), integer(1, MOST)
    group.add_argument("--epochs", type=positive, default=3.0, metavar="X", help="default 3")
    option = group.add_argument
    option(*names_of("steps"), type=count, metavar="N", help="end after so many steps")
    option(*names_of("batch"), type=count, default=4, metavar="N", help="default 4")
    option(*names_of("accumulation"), type=count, default=1, metavar="N", help="batches a step")
    group.add_argument(
        "--learning-rate",
        type=number(0, MOST, above_low=True),
        metavar="X",
        help="default 5e-4, with --method full 5e-5",
    )
    option(*names_of("window"), type=count, default=1024, metavar="N", help="tokens; default 1024")
    group.add_argument("--packing", action="store_true", help="several examples in a row")
    group.add_argument(
        "--gradient-checkpointing", action="store_true", help="less memory, more time"
    )
    group.add_argument(
        "--chat-template", metavar="FILE", help="Jinja; default: the tokenizer's, or a plain one"
    )
    group.add_argument(
        "--seed", type=integer(0, HIGHEST_SEED), default=0, metavar="N", help="default 0"
    )


def run(arguments: argparse.Namespace) -> None:
    """Train, and tell how it went."""
    from anymamba.cli.terminal.progress import Steps

    let_waiting_threads_sleep()
    with quiet(), network_allowed(not arguments.offline):
        finetune = import_finetune()  # which reads whether the network may be asked
    with quiet(), Steps("steps", visible=not arguments.json) as steps:
        figures = finetune(
            [*arguments.data, *arguments.more_data],
            arguments.output,
            arguments.model,
            settings_of(arguments),
            dataset=arguments.dataset,
            dataset_config=arguments.dataset_config,
            dataset_split=arguments.dataset_split,
            validation=arguments.validation,
            save_every=arguments.save_every,
            resume=arguments.resume,
            overwrite=arguments.overwrite,
            offline=arguments.offline,
            progress=steps.show,
        )
    report(arguments, figures)


def import_finetune() -> Callable[..., dict[str, Any]]:
    """The function that trains; the libraries below are kept from drawing on standard error.

    Raises:
        MissingDependencyError: one of them is not installed.
    """
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


def settings_of(arguments: argparse.Namespace) -> Any:
    """The settings that the options name."""
    from anymamba.cli.text.files import read_text
    from anymamba.training.finetune import FinetuneSettings

    template = arguments.chat_template
    return FinetuneSettings(
        method=arguments.method,
        rank=arguments.rank,
        alpha=arguments.alpha,
        targets=arguments.targets,
        rslora=arguments.rslora,
        adapter_dropout=arguments.adapter_dropout,
        epochs=arguments.epochs,
        max_steps=arguments.steps,
        batch_size=arguments.batch,
        accumulate=arguments.accumulation,
        learning_rate=arguments.learning_rate,
        max_length=arguments.window,
        packing=arguments.packing,
        gradient_checkpointing=arguments.gradient_checkpointing,
        chat_template=None if template is None else read_text(template),
        seed=arguments.seed,
        text_field=arguments.text_field,
    )


def report(arguments: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Print the figures."""
    from anymamba.cli.terminal.table import table

    if arguments.json:
        print(json.dumps(figures))
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
