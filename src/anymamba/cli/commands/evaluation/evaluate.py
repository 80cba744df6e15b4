"""`anymamba evaluate`: a model's results on the tasks of lm-evaluation-harness."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anymamba.cli.load_engine import model_name
from anymamba.cli.options.argument_types import finite, integer
from anymamba.cli.options.model import add_adapter_argument, add_model_arguments
from anymamba.cli.terminal.output import say
from anymamba.errors import InputError

__all__ = ["add_arguments", "run"]

DESCRIPTION = """\
Test a model on tasks of EleutherAI's lm-evaluation-harness, so that its results can be set beside
those of other models. Computes with PyTorch, and needs: pip install 'anymamba[eval]'. A task is a
name that `lm-eval ls tasks` lists, whose data is downloaded, or a YAML file that describes one.
"""
EXAMPLES = """\
examples:
  anymamba evaluate lambada_openai arc_easy --model state-spaces/mamba-130m-hf
  anymamba evaluate lambada_openai --model ./my-model --limit 500 --json
  anymamba evaluate my-task.yaml --model ./my-model --offline
  anymamba evaluate arc_easy --adapter ./my-adapter
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `anymamba evaluate`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument("tasks", nargs="+", metavar="TASK", help="a task's name, or a YAML file")
    parser.add_argument("--include", metavar="FOLDER", help="where more tasks are described")
    parser.add_argument(
        "--few-shots",
        type=integer(0),
        metavar="N",
        help="solved examples before each question (default: as the task says)",
    )
    parser.add_argument(
        "--limit", type=integer(1), metavar="N", help="take the first N questions of a task only"
    )
    parser.add_argument(
        "--batch-size", type=integer(1), default=8, metavar="N", help="questions at once; default 8"
    )
    parser.add_argument(
        "--max-length",
        type=integer(2),
        metavar="N",
        help="tokens that the model reads at once; longer texts are cut (default 2048)",
    )
    parser.add_argument("--device", help="where to compute (default: a GPU if there is one)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default: float32 on a CPU, elsewhere as stored",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_model_arguments(parser)
    add_adapter_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    """Test, and print."""
    from anymamba.checkpoint.io import user_path

    with network_allowed(not arguments.offline), model_folder(arguments) as model:
        from anymamba.training.evaluate import evaluate

        tokenizer = None if arguments.tokenizer is None else user_path(arguments.tokenizer)
        include = None if arguments.include is None else user_path(arguments.include)
        if include is not None and not include.is_dir():
            raise InputError(f"there is no folder {arguments.include!r} with tasks")
        results = evaluate(
            model,
            arguments.tasks,
            tokenizer=tokenizer,
            include=include,
            few_shots=arguments.few_shots,
            limit=arguments.limit,
            batch_size=arguments.batch_size,
            max_length=arguments.max_length,
            device=arguments.device,
            dtype=arguments.dtype,
        )
    report(arguments, results)


def report(arguments: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    """Print the results."""
    from anymamba.cli.terminal.table import table

    if arguments.json:
        tasks = {
            task: {metric: finite(value) for metric, value in figures.items()}
            for task, figures in results.items()
        }
        print(json.dumps({"model": model_name(arguments), "tasks": tasks}))
        return
    for task, figures in results.items():
        say(task)
        rows = [
            (f"  {metric}", f"{value:,}" if type(value) is int else f"{value:.4f}")
            for metric, value in figures.items()
        ]
        say(table(rows))


@contextmanager
def model_folder(arguments: argparse.Namespace) -> Iterator[Path]:
    """The model's folder: for the time being, of a GGUF file and of a model with its adapter."""
    from anymamba.assets import bundled_model
    from anymamba.checkpoint import resolve
    from anymamba.checkpoint.gguf import find_gguf
    from anymamba.checkpoint.io import user_path
    from anymamba.runtime.convert import convert, merge

    model, adapter, offline = arguments.model, arguments.adapter, arguments.offline
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "model"
        if adapter is not None:
            yield merge(adapter, place, model, offline=offline)
        elif model is not None and find_gguf(user_path(model)) is not None:
            yield convert(model, place, offline=offline)
        else:
            yield resolve(model or bundled_model(), offline=offline)


@contextmanager
def network_allowed(allowed: bool) -> Iterator[None]:
    """Tell the libraries that the harness uses whether they may ask the network."""
    names = () if allowed else ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
