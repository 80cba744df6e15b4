"""What every training run shares: atomic checkpoints, signals, resuming, its report."""

from anymamba.training.lifecycle.atomic_checkpoints import (
    CANNOT_WRITE,
    PARTIAL,
    last_checkpoint,
    not_written,
    publish,
)
from anymamba.training.lifecycle.progress import Progress
from anymamba.training.lifecycle.report import (
    ConsoleReport,
    MetricsFile,
    draw_losses,
    read_metrics,
    tensorboard_callback,
)
from anymamba.training.lifecycle.resume import check_resumable, check_same_settings, check_whole
from anymamba.training.lifecycle.signals import StopSignals
from anymamba.training.lifecycle.trainer import RunTrainer

__all__ = [
    "CANNOT_WRITE",
    "PARTIAL",
    "ConsoleReport",
    "MetricsFile",
    "Progress",
    "RunTrainer",
    "StopSignals",
    "check_resumable",
    "check_same_settings",
    "check_whole",
    "draw_losses",
    "last_checkpoint",
    "not_written",
    "publish",
    "read_metrics",
    "tensorboard_callback",
]
