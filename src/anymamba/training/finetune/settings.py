"""How a model is trained further: everything that decides the result, beside the examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from anymamba.errors import ConfigError
from anymamba.training.settings import HIGHEST_SEED

__all__ = ["LEARNING_RATES", "METHODS", "TARGETS", "FinetuneSettings"]

METHODS = ("lora", "dora", "full")
TARGETS = ("x_proj", "embeddings", "in_proj", "out_proj", "dt_proj")
"""What an adapter can change; the first four are those of Transformers' Mamba documentation."""

LEARNING_RATES = {"lora": 5e-4, "dora": 5e-4, "full": 5e-5}


@dataclass(frozen=True)
class FinetuneSettings:
    """How to fine-tune.

    Args:
        method: "lora", "dora", or "full" for all weights.
        rank: of the adapter's products.
        alpha: what they are scaled by, over the rank; None for twice the rank.
        targets: which of `TARGETS` get an adapter.
        rslora: divide alpha by the rank's square root, which suits large ranks.
        adapter_dropout: the share of an adapter's inputs that is left out at random.
        epochs: how often each example is seen.
        max_steps: end after so many steps of the optimizer instead.
        batch_size: examples at a time.
        accumulate: batches a step.
        learning_rate: at its height, after warming up; None for 5e-4, and 5e-5 for all weights.
        max_length: tokens an example; what is longer loses its end.
        packing: put several examples into a row, which do not see each other.
        gradient_checkpointing: compute twice rather than remember, for less memory.
        chat_template: how conversations are written down, in Jinja; None for the tokenizer's.
        seed: of all that is random.
        text_field: the field of JSON and datasets that has a text to train on; None for
            conversations, prompts with completions, or `text`.

    Raises:
        ConfigError: a value makes no sense.

    Example:
        >>> FinetuneSettings(method="lore")
        Traceback (most recent call last):
            ...
        anymamba.errors.ConfigError: method must be one of lora, dora, full, got 'lore'
    """

    method: str = "lora"
    rank: int = 16
    alpha: float | None = None
    targets: Sequence[str] = ("x_proj", "embeddings", "in_proj", "out_proj")
    rslora: bool = False
    adapter_dropout: float = 0.0
    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 4
    accumulate: int = 1
    learning_rate: float | None = None
    max_length: int = 1024
    packing: bool = False
    gradient_checkpointing: bool = False
    chat_template: str | None = None
    seed: int = 0
    text_field: str | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        wrong = [target for target in self.targets if target not in TARGETS]
        if wrong or not self.targets:
            raise ConfigError(f"targets must be of {', '.join(TARGETS)}, got {wrong or 'none'}")
        for name in (
            "rank",
            "batch_size",
            "accumulate",
            "max_length",
            "epochs",
            "alpha",
            "learning_rate",
        ):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"{name} must be a number above 0, got {value!r}")
        if self.max_steps is not None and self.max_steps < 1:
            raise ConfigError(f"max_steps must be at least 1, got {self.max_steps!r}")
        if not 0 <= self.adapter_dropout < 1:
            raise ConfigError(
                f"adapter_dropout must be at least 0 and less than 1, got {self.adapter_dropout!r}"
            )
        if not 0 <= self.seed <= HIGHEST_SEED:
            raise ConfigError(f"seed must be 0 to {HIGHEST_SEED}, got {self.seed!r}")
