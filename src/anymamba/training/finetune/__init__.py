"""Training a model further, or an adapter of it.

`finetune` loads on first use, so that the command line can read the settings without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from anymamba.training.finetune.settings import METHODS, TARGETS, FinetuneSettings

if TYPE_CHECKING:
    from anymamba.training.finetune.run import finetune

__all__ = ["METHODS", "TARGETS", "FinetuneSettings", "finetune"]


def __getattr__(name: str) -> object:
    if name != "finetune":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from anymamba.training.finetune.run import finetune

    return finetune
