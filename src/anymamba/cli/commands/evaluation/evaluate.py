"""`anymamba evaluate`: a model's results on the tasks of lm-evaluation-harness."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anymamba.cli.load_engine import model_name
from anymamba.cli.options.fields import flag, integer_option, option
from anymamba.cli.options.model import AdapterOptions
from anymamba.cli.terminal.output import json_line, say
from anymamba.errors import InputError

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


@dataclass(frozen=True)
class Options(AdapterOptions):
    """What `anymamba evaluate` is asked for."""

    tasks: Sequence[str] = option(nargs="+", metavar="TASK", help="a task's name, or a YAML file")
    include: str | None = option("--include", metavar="FOLDER", help="a folder with more tasks")
    few_shots: int | None = integer_option(
        "--few-shots",
        low=0,
        help="solved examples before each question (default: as the task says)",
    )
    limit: int | None = integer_option("--limit", help="take the first N questions of a task only")
    batch_size: int = integer_option("--batch-size", default=8, help="questions at once; default 8")
    max_length: int | None = integer_option(
        "--max-length",
        low=2,
        help="tokens that the model reads at once; longer texts are cut (default 2048)",
    )
    device: str | None = option("--device", help="where to compute (default: a GPU if any)")
    dtype: str | None = option(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default: float32 on a CPU, elsewhere as stored",
    )
    json: bool = flag("--json", "print one JSON object")


def run(options: Options) -> None:
    """Test, and print."""
    from anymamba.checkpoint.io import user_path

    with network_allowed(not options.offline), model_folder(options) as model:
        from anymamba.training.evaluate import evaluate

        tokenizer = None if options.tokenizer is None else user_path(options.tokenizer)
        include = None if options.include is None else user_path(options.include)
        if include is not None and not include.is_dir():
            raise InputError(f"there is no folder {options.include!r} with tasks")
        results = evaluate(
            model,
            options.tasks,
            tokenizer=tokenizer,
            include=include,
            few_shots=options.few_shots,
            limit=options.limit,
            batch_size=options.batch_size,
            max_length=options.max_length,
            device=options.device,
            dtype=options.dtype,
        )
    report(options, results)


def report(options: Options, results: dict[str, dict[str, Any]]) -> None:
    """Print the results."""
    from anymamba.cli.terminal.table import table

    if options.json:
        print(json_line({"model": model_name(options), "tasks": results}))
        return
    for task, figures in results.items():
        say(task)
        rows = [
            (f"  {metric}", f"{value:,}" if type(value) is int else f"{value:.4f}")
            for metric, value in figures.items()
        ]
        say(table(rows))


@contextmanager
def model_folder(options: Options) -> Iterator[Path]:
    """The model's folder: for the time being, of a GGUF file and of a model with its adapter."""
    from anymamba.assets import bundled_model
    from anymamba.checkpoint import resolve
    from anymamba.checkpoint.gguf import find_gguf
    from anymamba.checkpoint.io import user_path
    from anymamba.runtime.convert import convert, merge

    model, adapter, offline = options.model, options.adapter, options.offline
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
