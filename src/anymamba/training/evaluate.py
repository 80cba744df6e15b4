"""A model's results on the tasks of EleutherAI's lm-evaluation-harness.

The harness asks its questions of a Hugging Face model and tokenizer; `MambaForCausalLM` is one, so
nothing of a task is computed here, and results can be set beside those of other models.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anymamba.checkpoint.io import read_text, user_path
from anymamba.devices import find_device
from anymamba.errors import InputError, MissingDependencyError

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM

_YAML = (".yaml", ".yml")


def evaluate(
    model: Path,
    tasks: Sequence[str],
    *,
    tokenizer: Path | None = None,
    include: Path | None = None,
    few_shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Test a model on tasks.

    Args:
        model: its folder, in any layout.
        tasks: names of the harness's tasks and groups, or YAML files that describe one.
        tokenizer: a folder with a tokenizer, where the model comes without one.
        include: a folder with more tasks, whose names can be given.
        few_shots: how many solved examples come before each question; None: as the task says.
        limit: take the first so many questions of each task only.
        batch_size: how many questions are asked at once.
        max_length: how many tokens the model reads at once; longer texts are cut into windows, as
            tasks on perplexity do. None is the harness's 2,048.
        device: where to compute; None takes a GPU if there is one.
        dtype: float32, bfloat16 or float16; None is float32 on a CPU, elsewhere as stored.

    Returns:
        The results by task, each a figure by metric, as the harness has them.

    Raises:
        MissingDependencyError: the harness is not installed.
        InputError: there is no such task, it cannot be loaded, or it gives no figures.
        CheckpointError: the model or its tokenizer is missing or broken.
        BackendError: there is no such device.
    """
    names, folders, defaults = _named(tasks)
    with _without_remarks():
        harness = _harness()
        import datasets
        from lm_eval.tasks import TaskManager

        paths = [str(folder) for folder in [*folders, *([include] if include else [])]]
        manager = TaskManager(include_path=paths or None, include_defaults=defaults)
        unknown = [name for name in names if name not in manager.all_tasks]
        if unknown:
            raise InputError(
                f"there is no task {', '.join(map(repr, unknown))}: give a name that "
                "`lm-eval ls tasks` lists, or a YAML file (with --include, a name in that folder)"
            )
        datasets.disable_progress_bars()  # the harness shows its own
        manager.load = _naming(manager.load)
        opened = harness_model(model, tokenizer, batch_size, max_length, device, dtype)
        with _answers_fit(max_length), _git_unasked():
            results = harness.simple_evaluate(
                opened,
                tasks=names,
                num_fewshot=few_shots,
                limit=limit,
                task_manager=manager,
                log_samples=False,
            )
    found = {name: _figures(results, name) for name in results["results"]}
    empty = [name for name in names if not found.get(name, {}).keys() - {"questions"}]
    if empty:
        raise InputError(
            f"the task {empty[0]!r} gives no figures: its metric_list must name metrics that the "
            "harness has, and its data must hold questions"
        )
    return found


def _naming(load: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A loader of tasks whose errors say that a task is wrong."""

    def named(tasks: Any) -> Any:
        try:
            return load(tasks)
        # A task holds templates, names of data and functions: anything may go wrong.
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"the harness cannot load {', '.join(map(repr, tasks))}: {type(error).__name__}: "
                f"{reason}; correct the task's file or its data, or without --offline let it be "
                "downloaded"
            ) from error

    return named


@contextmanager
def _answers_fit(max_length: int | None) -> Iterator[None]:
    """Say what the harness means where an answer has more tokens than are read at once."""
    try:
        yield
    except AssertionError as error:
        if max_length is None:
            raise
        raise InputError(
            f"the harness refuses a question: with max_length={max_length} an answer may be longer "
            "than what is read at once; raise it (on the command line --max-length)"
        ) from error


@contextmanager
def _git_unasked() -> Iterator[None]:
    """The harness asks git about the folder that one happens to be in, and git complains."""
    from lm_eval import evaluator

    ask = evaluator.get_git_commit_hash
    evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = ask


def harness_model(
    model: Path,
    tokenizer: Path | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> HFLM:
    """Open a model as the harness wants it, for programs that call the harness themselves.

    Args:
        model, tokenizer, batch_size, max_length, device, dtype: as for `evaluate`.

    Returns:
        An `lm_eval` model.

    Raises:
        MissingDependencyError, CheckpointError, BackendError: as `evaluate`.
    """
    _harness()
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers.utils.logging import disable_progress_bar

    from anymamba.modeling import load_causal_lm
    from anymamba.training.data import stored_tokenizer
    from anymamba.training.load_trainable import check_weights

    disable_progress_bar()  # of loading weights

    words = stored_tokenizer(tokenizer or model)
    place = find_device(device)
    dtype = dtype or ("float32" if place.type == "cpu" else "auto")
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    loaded: Any = load_causal_lm(model, dtype=wanted)
    loaded.to(place)
    check_weights(loaded)
    # The harness looks for one of Transformers' formats here; the layers are in place already.
    vars(loaded.config).pop("quantization_config", None)
    prefix = _prefix_token(words, loaded.config)
    _complete(words)
    return HFLM(
        pretrained=loaded,
        tokenizer=words,
        backend="causal",
        batch_size=batch_size,
        max_length=max_length,
        prefix_token_id=prefix,
    )


def _complete(tokenizer: Any) -> None:
    """Name the marks that the harness needs to ask for a text, where a tokenizer has none.

    A model of bytes has none: token 0 becomes its end and its padding, which is masked anyway. The
    harness would add a token that the model does not have.
    """
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)


def _prefix_token(tokenizer: Any, config: Any) -> int:
    """The token before a text of which nothing was read: its mark of a beginning, or a new line.

    An end token that the model knows nothing of is there for trainers, which ask for one.
    """
    ends = tokenizer.eos_token_id if config.eos_token_id is not None else None
    for token in (tokenizer.bos_token_id, ends):
        if token is not None:
            return int(token)
    lines = tokenizer("\n", add_special_tokens=False)["input_ids"]
    return int(lines[0]) if lines else 0


def _named(tasks: Sequence[str]) -> tuple[list[str], list[Path], bool]:
    """Names of all tasks, the folders of those in files, and whether others are among them."""
    names, folders, others = [], [], False
    for task in tasks:
        file = user_path(task, InputError)
        if file.suffix not in _YAML:
            names.append(task)
            others = True
            continue
        if not file.is_file():
            raise InputError(f"there is no file {task!r} with a task")
        # Only the harness can read all of it: it may name functions.
        found = re.search(r"^task: *[\"']?([^\s\"'#]+)", read_text(file), re.MULTILINE)
        if found is None:
            raise InputError(f"{task!r} gives its task no name: a line `task: NAME` is missing")
        names.append(found[1])
        folders.append(file.parent.absolute())
    return names, folders, others


def _figures(results: Any, name: str) -> dict[str, Any]:
    """The metrics of a task and how many questions it asked, without what is no number."""
    found = {
        metric.removesuffix(",none"): value
        for metric, value in results["results"][name].items()
        if isinstance(value, int | float) and metric != "sample_len"
    }
    questions = results["n-samples"].get(name)
    return found if questions is None else found | {"questions": questions["effective"]}


def _harness() -> Any:
    try:
        import lm_eval
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"evaluating needs the package {error.name!r}, which is not installed: "
            "pip install 'anymamba[eval]'"
        ) from None
    return lm_eval


@contextmanager
def _without_remarks() -> Iterator[None]:
    """The harness warns of what is meant here, and remarks on its progress as if it were output."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
