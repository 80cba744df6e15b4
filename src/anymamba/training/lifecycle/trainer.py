"""What every training run adds to Transformers' Trainer: nothing is lost, and no NaN is learned."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from anymamba.errors import TrainingError
from anymamba.training.lifecycle.atomic_checkpoints import (
    CANNOT_WRITE,
    PARTIAL,
    keep_last,
    not_written,
    publish,
    what_is_left,
)


class RunTrainer(Trainer):
    """A trainer whose checkpoints are complete or not there, and that stops at NaN.

    Attributes:
        checkpoints: the folder of the checkpoints.
        keep_checkpoints: how many of the last are kept.

    Raises:
        TrainingError (from `train`): a loss or the norm of the gradients is NaN or infinite, or a
            checkpoint cannot be written. The checkpoints before are as they were.
    """

    checkpoints: Path
    keep_checkpoints: int = 2

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of one batch."""
        loss: Tensor = super().training_step(*args, **kwargs)
        self._check_finite("loss", float(loss))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._check_finite("norm of the gradients", float(norm))
        return norm

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"the {what} became {value} in step {self.state.global_step + 1}, and no result "
                f"was written; {what_is_left(self.checkpoints)}. Lower the learning rate, or "
                "compute in float32"
            )

    def _get_output_dir(self, trial: Any) -> str:
        """Where a checkpoint is written before it gets its name."""
        return str(self.checkpoints / PARTIAL)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint beside the others, and name it when all of it is on the disk."""
        name = f"checkpoint-{self.state.global_step}"
        partial = self.checkpoints / PARTIAL
        try:
            if self.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.add_to_checkpoint(partial / name)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish(partial / name, self.checkpoints / name)
                keep_last(self.checkpoints, self.keep_checkpoints)
        except CANNOT_WRITE as error:
            raise not_written(f"checkpoint {name!r}", error, self.checkpoints) from error
        finally:
            if self.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)

    def add_to_checkpoint(self, folder: Path) -> None:
        """Write what a run has beyond Transformers' files. Every process calls this."""
