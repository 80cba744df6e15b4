"""TRL's trainer in the lifecycle of our runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trl import SFTTrainer

from anymamba.renamed import old_names
from anymamba.training.finetune.checkpoints import RUN_FILE
from anymamba.training.lifecycle import RunTrainer


class FinetuneTrainer(RunTrainer, SFTTrainer):  # type: ignore[misc]
    """TRL's trainer, whose checkpoints tell which run they are of.

    Args:
        checkpoints: the folder that they lie in.
        facts: what `facts_of` says of the run.
        *args, **kwargs: those of `SFTTrainer`.
    """

    def __init__(self, *args: Any, checkpoints: Path, facts: dict[str, Any], **kwargs: Any) -> None:
        self.checkpoints, self.facts = checkpoints, facts
        super().__init__(*args, **kwargs)

    def add_to_checkpoint(self, folder: Path) -> None:
        """Write the facts of the run."""
        (folder / RUN_FILE).write_text(json.dumps(self.facts) + "\n", encoding="utf-8")


__getattr__ = old_names(__name__)
