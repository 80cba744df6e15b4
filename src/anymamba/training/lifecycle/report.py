"""What a run tells: lines on the console, JSON lines, TensorBoard, and a picture at the end."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from anymamba.checkpoint.io import escaped
from anymamba.training.lifecycle.atomic_checkpoints import not_written


class MetricsFile(TrainerCallback):
    """Each line of metrics as a line of JSON in a file.

    Args:
        path: the file; it is gone on with.
        after_step: what was written for later steps is dropped, because it comes again.
        checkpoints: where a message says what is left.
    """

    def __init__(self, path: Path, after_step: int, checkpoints: Path) -> None:
        self._path, self._checkpoints = path, checkpoints
        kept = [line for line in read_metrics(path) if line["step"] <= after_step]
        self._put("".join(json.dumps(line) + "\n" for line in kept), "w")

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Write a line."""
        if state.is_world_process_zero and logs and "train_runtime" not in logs:
            self._put(json.dumps({"step": state.global_step, **logs}) + "\n", "a")

    def _put(self, text: str, mode: str) -> None:
        try:
            with self._path.open(mode, encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise not_written(str(self._path), error, self._checkpoints) from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, up to the first that is none: a kill leaves half a line."""
    if not path.is_file():
        return []
    lines: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            break
        if not isinstance(found, dict) or not isinstance(found.get("step"), int):
            break
        lines.append(found)
    return lines


class ConsoleReport(TrainerCallback):
    """Lines of metrics on standard error, and on a terminal a progress bar below them.

    Args:
        trainer: whose progress.
    """

    def __init__(self, trainer: Any) -> None:
        from tqdm import tqdm

        self._trainer = trainer
        # None: no bar where standard error is no terminal.
        form = "{desc} |{bar:40}| {percentage:3.0f} %, {remaining} left"
        self._bar = tqdm(total=1.0, bar_format=form, leave=False, disable=None)

    def __enter__(self) -> ConsoleReport:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._bar.close()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        self._bar.set_description_str(f"step {state.global_step}", refresh=False)
        self._bar.update(min(self._trainer.share_spent, 1.0) - self._bar.n)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Print a line."""
        if state.is_world_process_zero and logs and "train_runtime" not in logs:
            self._bar.write(escaped(line_of(state.global_step, logs)), file=sys.stderr)


def line_of(step: int, logs: dict[str, Any]) -> str:
    """Metrics for people."""
    if "sample" in logs:
        return f"step {step:6}  sample: {logs['sample']}"
    if "eval_loss" in logs:
        loss = logs["eval_loss"]
        return f"step {step:6}  validation loss {loss:.4f} ({loss / math.log(2):.4f} bits)"
    return (
        f"step {step:6}  loss {logs['loss']:.4f}  rate {logs['learning_rate']:.2e}  gradients "
        f"{logs['gradient_norm']:.2f}  {logs['tokens_per_second']:,.0f} tokens/s"
    )


def tensorboard_callback(folder: Path) -> TrainerCallback | None:
    """Transformers' callback for TensorBoard, or None where that is not installed."""
    from transformers.integrations.integration_utils import (
        TensorBoardCallback,
        is_tensorboard_available,
    )

    if not is_tensorboard_available():
        return None
    from torch.utils.tensorboard import SummaryWriter

    made: TrainerCallback = TensorBoardCallback(tb_writer=SummaryWriter(log_dir=str(folder)))
    return made


def draw_losses(lines: Sequence[dict[str, Any]], path: Path) -> bool:
    """Draw the losses over the steps as a PNG; False where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, label in (("loss", "training"), ("eval_loss", "validation")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(
                *zip(*points, strict=True), label=label, marker="." if len(points) < 40 else ""
            )
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=120)
    return True
