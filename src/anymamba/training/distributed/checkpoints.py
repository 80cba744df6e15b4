"""Checkpoints that every process writes its part of, and any number of processes reads.

`torch.distributed.checkpoint` does the writing. A folder appears under its name when it is
complete: who finds it can use it. Its files hold pickles, as PyTorch defines them: load your own.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from anymamba.checkpoint.config import read_config
from anymamba.checkpoint.io import flush_to_disk, move_into_place, user_path
from anymamba.errors import CheckpointError
from anymamba.modeling.auto import CLASSES, new_causal_lm
from anymamba.modeling.mamba import MambaForCausalLM

_PROGRESS = "progress.json"


def save_sharded(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    progress: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint; every process calls it, and writes what it holds.

    Args:
        folder: a new one, which all processes see. It appears when all have written.
        model: a `MambaForCausalLM`, alone, in DDP, or sharded.
        optimizer: its state goes along.
        progress: what else to remember, such as the step: JSON's types.

    Raises:
        CheckpointError: the folder exists, or cannot be written. It then does not exist.
    """
    target = Path(user_path(folder))
    unfinished = target.with_name(f"{target.name}.unfinished")
    _on_the_first(lambda: _make_room(target, unfinished))
    try:
        with _quiet():
            save(_parts(model, optimizer), checkpoint_id=unfinished)
    except (CheckpointException, OSError) as error:
        raise CheckpointError(f"cannot write {str(target)!r}: {_first_of(error)}") from error
    _on_the_first(lambda: _finish(model, progress or {}, unfinished, target))


def load_sharded(
    folder: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Read a checkpoint into a model, on any number of processes; every one of them calls it.

    Args:
        folder: what `save_sharded` wrote.
        model: of the same configuration, alone, in DDP, or sharded; changed in place.
        optimizer: gets its state, if it was saved.

    Returns:
        What was given as progress.

    Raises:
        CheckpointError: it is no such folder, or holds another model.
    """
    source = Path(user_path(folder))
    progress = _progress_of(source)
    parts = _parts(model, optimizer)
    _read(source, parts)
    # Tied weights are stored once; that nothing else is missing was checked by loading.
    set_model_state_dict(model, parts["model"], options=StateDictOptions(strict=False))
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, parts["optimizer"])
    return progress


def export_sharded(
    folder: str | os.PathLike[str], output: str | os.PathLike[str]
) -> MambaForCausalLM:
    """Turn a checkpoint into a normal model folder, as `save_pretrained` writes it.

    One process does it, wherever the checkpoint was written.

    Args:
        folder: what `save_sharded` wrote.
        output: where the model goes.

    Returns:
        The model.

    Raises:
        CheckpointError: it is no such folder.
    """
    source = Path(user_path(folder))
    _progress_of(source)
    config_class = CLASSES[read_config(source)[1]["model_type"]].config
    model = new_causal_lm(config_class.from_pretrained(source))
    parts = {"model": _model_part(model)}
    _read(source, parts, no_dist=True)
    set_model_state_dict(model, parts["model"], options=StateDictOptions(strict=False))
    model.save_pretrained(user_path(output))
    return model


def _read(source: Path, parts: dict[str, Any], no_dist: bool = False) -> None:
    """Fill tensors in place with what the checkpoint has under their names."""
    try:
        with _quiet():
            load(parts, checkpoint_id=source, no_dist=no_dist)
    except (CheckpointException, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{str(source)!r} does not fit this model: {_first_of(error)}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without PyTorch's remark that there is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _parts(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    parts: dict[str, Any] = {"model": _model_part(model)}
    if optimizer is not None:
        parts["optimizer"] = get_optimizer_state_dict(model, optimizer)
    return parts


def _model_part(model: nn.Module) -> dict[str, Any]:
    weights: dict[str, Any] = get_model_state_dict(model)
    tied = _bare(model).all_tied_weights_keys
    return {name: weight for name, weight in weights.items() if name not in tied}


def _bare(model: nn.Module) -> Any:
    """The model itself, without DDP around it."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _make_room(target: Path, unfinished: Path) -> None:
    if target.exists():
        raise CheckpointError(f"{str(target)!r} exists already: give the checkpoint another name")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    unfinished.mkdir(parents=True)


def _finish(model: nn.Module, progress: dict[str, Any], unfinished: Path, target: Path) -> None:
    _bare(model).config.save_pretrained(unfinished)
    (unfinished / _PROGRESS).write_text(json.dumps(progress), encoding="utf-8")
    for file in unfinished.iterdir():
        flush_to_disk(file)
    move_into_place(unfinished, target)


def _progress_of(source: Path) -> dict[str, Any]:
    try:
        progress: dict[str, Any] = json.loads((source / _PROGRESS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{str(source)!r} is no checkpoint that save_sharded wrote: {error}"
        ) from error
    return progress


def _on_the_first(act: Callable[[], None]) -> None:
    """Act on the first process, while the others wait; they all raise what it raises."""
    together = dist.is_available() and dist.is_initialized()
    outcome: list[str | None] = [None]
    if not together or dist.get_rank() == 0:
        try:
            act()
        except OSError as error:
            outcome = [str(error)]
    if together:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise CheckpointError(outcome[0])


def _first_of(error: BaseException) -> str:
    """A line for people, from PyTorch's report on all processes."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"process {rank}: {cause}"
    return str(error)
