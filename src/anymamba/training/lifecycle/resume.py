"""Whether a run can go on from a checkpoint: looked at before anything is written."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

from torch import nn

from anymamba.checkpoint.io import listed, read_json_object, shown
from anymamba.checkpoint.safetensors import read_header
from anymamba.errors import CheckpointError, TrainingError
from anymamba.training.lifecycle.progress import FILE_NAME, Progress
from anymamba.training.settings import Settings

WEIGHTS = "model.safetensors"
OBJECTS = ("config.json", "trainer_state.json", FILE_NAME)
PICKLES = ("optimizer.pt", "scheduler.pt")

# What a run that goes on may be given anew: how long it lasts, how it is computed, what is looked
# at and kept, and where everything lies. That texts and tokenizer are the same, the tokens tell.
CHANGEABLE = {
    *("steps", "minutes", "dtype", "device", "threads", "gradient_checkpointing", "compile"),
    *("log_every", "evaluate_every", "evaluate_windows", "evaluation_window", "patience"),
    *("save_every", "keep_checkpoints", "keep", "sample_prompt", "sample_tokens", "store", "plot"),
    *("tensorboard", "output", "data", "dataset", "dataset_config", "dataset_split", "text_field"),
    *("validation_data", "validation_share", "tokenizer", "vocab_size", "end_of_text"),
}


def check_same_settings(begun: Settings, given: Settings) -> None:
    """Refuse settings that a run which goes on could not follow, or only from here on.

    Raises:
        TrainingError: the message names those that differ.

    Example:
        >>> check_same_settings(Settings(window=64), Settings(window=64, steps=10))
        >>> check_same_settings(Settings(window=64), Settings(window=32))
        Traceback (most recent call last):
            ...
        anymamba.errors.TrainingError: the run that is to go on began with window=64, and \
window=32 is asked for: leave that out, or begin anew with --overwrite
    """
    names = [entry.name for entry in fields(Settings) if entry.name not in CHANGEABLE]
    differing = [name for name in names if getattr(begun, name) != getattr(given, name)]
    if differing:
        before, asked = (
            listed(f"{name}={shown(getattr(settings, name))}" for name in differing)
            for settings in (begun, given)
        )
        raise TrainingError(
            f"the run that is to go on began with {before}, and {asked} is asked for: leave that "
            "out, or begin anew with --overwrite"
        )


def check_resumable(checkpoint: Path, model: nn.Module, text: int, rows: int | None) -> None:
    """Refuse a checkpoint that is damaged, or of another run.

    Only the beginnings of large files are read.

    Args:
        checkpoint: its folder.
        model: what is to be trained.
        text: the number that tells the tokens, as in `Progress`.
        rows: how many rows' states are carried; None where none are.
    """
    check_whole(checkpoint, WEIGHTS, OBJECTS)
    try:
        states = [shapes_in(file)["ssm"][1] for file in checkpoint.glob("carried-*.safetensors")]
        found = Progress.load(checkpoint).text
    except (CheckpointError, KeyError, IndexError, TypeError) as error:
        raise damaged(checkpoint, error) from None
    if found != text:
        raise TrainingError(
            f"{str(checkpoint)!r} was trained on another text or with another tokenizer: give the "
            "same data, or begin anew with --overwrite"
        )
    check_same_model(checkpoint, shapes_in(checkpoint / WEIGHTS), model)
    if rows is not None and any(count != rows for count in states):
        raise TrainingError(
            f"{str(checkpoint)!r} carries the states of {states[0]} rows, and batch is {rows}: "
            "give the same batch, or begin anew with --overwrite"
        )


def check_whole(checkpoint: Path, weights: str, objects: Iterable[str]) -> None:
    """Refuse a checkpoint whose weights, JSON objects or pickles are missing or cut off."""
    try:
        for name in objects:
            read_json_object(checkpoint / name)
        read_header(checkpoint / weights)
        for file in (*(checkpoint / name for name in PICKLES), *checkpoint.glob("rng_state*.pth")):
            if not zipfile.is_zipfile(file):  # as torch.save writes
                raise CheckpointError(f"{str(file)!r} is missing or broken")
    except CheckpointError as error:
        raise damaged(checkpoint, error) from None


def damaged(checkpoint: Path, error: Exception) -> TrainingError:
    """The error for a checkpoint that cannot be read, and what to do."""
    return TrainingError(
        f"cannot go on from {str(checkpoint)!r}: {error}. Remove that folder to go on from the "
        "checkpoint before it, or begin anew with --overwrite"
    )


def check_same_model(
    checkpoint: Path, stored: dict[str, tuple[int, ...]], model: nn.Module
) -> None:
    """Refuse a model whose weights do not have the names and shapes that are stored."""
    # A head that is the embeddings is a parameter once, and stored once.
    wanted = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    wrong = [name for name in {**wanted, **stored} if wanted.get(name) != stored.get(name)]
    if wrong:
        raise TrainingError(
            f"{str(checkpoint)!r} is of a model of other sizes ({listed(sorted(wrong)[:2])}, ...): "
            "give the settings that it was begun with, or begin anew with --overwrite"
        )


def shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a file."""
    return {name: record.shape for name, record in read_header(file).tensors.items()}
