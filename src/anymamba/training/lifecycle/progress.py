"""What a run knows of its own past: kept in each checkpoint, so that it goes on where it was."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

FILE_NAME = "progress.json"


@dataclass
class Progress:
    """The past of a run, over all its interruptions.

    Attributes:
        step: steps taken.
        tokens: tokens read, on all processes.
        seconds: time spent, up to the last `tick`.
        loss_sum, loss_count: of the steps since the last line of metrics.
        best_loss, best_step: of the evaluations so far.
        without_better: evaluations since the best.
        text: a number that tells whether the tokens are the same.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    loss_count: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    without_better: int = 0
    text: int = 0
    _ticked: float = field(default_factory=time.monotonic, repr=False)

    def start(self) -> None:
        """Let the clock go on from now: what came before, such as reading texts, does not count."""
        self._ticked = time.monotonic()

    def tick(self) -> float:
        """Count the time since the last tick, and return the seconds so far."""
        now = time.monotonic()
        self.seconds += now - self._ticked
        self._ticked = now
        return self.seconds

    def note_loss(self, loss: float, step: int) -> bool:
        """Note an evaluation, and tell whether it is the best so far."""
        better = loss < self.best_loss
        if better:
            self.best_loss, self.best_step, self.without_better = loss, step, 0
        else:
            self.without_better += 1
        return better

    def save(self, folder: Path) -> None:
        """Write it into a checkpoint."""
        content = {name: value for name, value in asdict(self).items() if name[0] != "_"}
        (folder / FILE_NAME).write_text(json.dumps(content) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Progress:
        """Read it from a checkpoint; the clock goes on from now."""
        return cls(**json.loads((folder / FILE_NAME).read_text(encoding="utf-8")))
