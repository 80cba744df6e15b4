"""TRL's trainer, with checkpoints that are whole or not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from trl import SFTTrainer

from anymamba.training.finetune.checkpoints import RUN_FILE
from anymamba.training.lifecycle import (
    CANNOT_WRITE,
    PARTIAL,
    keep_last,
    not_written,
    publish,
)

__all__ = ["CheckpointingTrainer"]

KEPT = 2


class CheckpointingTrainer(SFTTrainer):  # type: ignore[misc]
    """TRL's trainer, whose checkpoints get their name when all of them is on the disk.

    Args:
        checkpoints: the folder that they lie in.
        facts: what `facts_of` says of the run.
        *args, **kwargs: those of `SFTTrainer`.

    Raises:
        TrainingError (from `train`): a checkpoint cannot be written.
    """

    def __init__(self, *args: Any, checkpoints: Path, facts: dict[str, Any], **kwargs: Any) -> None:
        self.checkpoints, self.facts = checkpoints, facts
        super().__init__(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        """Where a checkpoint is written before it gets its name."""
        return str(self.checkpoints / PARTIAL)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        name = f"checkpoint-{self.state.global_step}"
        partial = self.checkpoints / PARTIAL
        try:
            shutil.rmtree(partial, ignore_errors=True)
            super()._save_checkpoint(model, trial)
            text = json.dumps(self.facts) + "\n"
            (partial / name / RUN_FILE).write_text(text, encoding="utf-8")
            publish(partial / name, self.checkpoints / name)
            keep_last(self.checkpoints, KEPT)
        except CANNOT_WRITE as error:
            raise not_written(f"checkpoint {name!r}", error, self.checkpoints) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
