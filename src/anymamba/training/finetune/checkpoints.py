"""Where the checkpoints of fine-tuning lie, and which run they are of."""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from anymamba.errors import InputError, TrainingError
from anymamba.training.data import Example
from anymamba.training.finetune.settings import FinetuneSettings
from anymamba.training.lifecycle import check_whole, last_checkpoint

RUN_FILE = "finetune.json"
# What may differ from the run that is gone on with: how far it goes.
BUDGET = ("epochs", "max_steps")


def facts_of(settings: FinetuneSettings, model: str, examples: list[Example]) -> dict[str, Any]:
    """What makes a run the same as another: settings, model and examples, as JSON has them."""
    content = json.dumps(examples).encode()
    found = asdict(settings) | {"model": model, "examples": zlib.crc32(content)}
    fields: dict[str, Any] = json.loads(json.dumps(found))
    return {name: value for name, value in fields.items() if name not in BUDGET}


def place_beside(target: Path, resume: bool, overwrite: bool) -> Path:
    """The folder of the checkpoints, which lies beside the result.

    Raises:
        InputError: there is an earlier run, which is neither to go on nor to be replaced; or none
            to go on with.
    """
    place = target.with_name(f"{target.name}.checkpoints")
    found = last_checkpoint(place)
    if resume and found is None:
        raise InputError(
            f"there is nothing to go on with: {str(place)!r} holds no checkpoint; --save-every "
            "keeps some"
        )
    if found is not None and not resume and not overwrite:
        raise InputError(
            f"{str(place)!r} holds the checkpoints of a run: go on with --resume, or replace them "
            "with --overwrite"
        )
    return place


def resumable(place: Path, facts: dict[str, Any]) -> Path:
    """The last checkpoint, if it is of this run.

    Raises:
        TrainingError: it is of a run with other examples, another model or other settings, or
            cannot be read.
    """
    last = last_checkpoint(place)
    assert last is not None
    adapter = (last / "adapter_config.json").is_file()
    weights = "adapter_model.safetensors" if adapter else "model.safetensors"
    check_whole(last, weights, (RUN_FILE, "trainer_state.json"))
    before = json.loads((last / RUN_FILE).read_text(encoding="utf-8"))
    other = [name for name in facts if before.get(name) != facts[name]]
    if other:
        raise TrainingError(
            f"{str(last)!r} is of a run with other {', '.join(other)}: give the same, or begin "
            "anew with --overwrite"
        )
    return last
