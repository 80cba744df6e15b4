"""How a model is trained further: everything that decides the result, beside the examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anymamba.training.settings import HIGHEST_SEED, check_fields, setting

LEARNING_RATES = {"lora": 5e-4, "dora": 5e-4, "full": 5e-5}
METHODS = tuple(LEARNING_RATES)
TARGETS = ("x_proj", "embeddings", "in_proj", "out_proj", "dt_proj")
"""What an adapter can change; the first four are those of Transformers' Mamba documentation."""


@dataclass(frozen=True)
class FinetuneSettings:
    """How to fine-tune. Every field is an option of the command line, too;
    `field.metadata["help"]` says what it means.

    Raises:
        ConfigError: a value makes no sense, naming the field, the value and what was expected.

    Example:
        >>> FinetuneSettings(method="lore")
        Traceback (most recent call last):
            ...
        anymamba.errors.ConfigError: method must be one of lora, dora, full, got 'lore'
    """

    # What is trained.
    method: str = setting("lora", "an adapter (lora, dora), or all weights (full)", choices=METHODS)
    rank: int = setting(16, "rank of the adapter's matrices", low=1)
    alpha: float | None = setting(
        None, "what the adapter is scaled by, over the rank; default: twice the rank", above=0.0
    )
    targets: Sequence[str] = setting(
        TARGETS[:4],
        f"the layers that get an adapter; default {' '.join(TARGETS[:4])}; also dt_proj",
        choices=TARGETS,
        many="NAME",
    )
    rslora: bool = setting(
        False, "divide alpha by the square root of the rank, which suits large ranks"
    )
    adapter_dropout: float = setting(0.0, "dropout on the adapter's inputs", low=0.0, high=0.99)

    # How it is trained.
    epochs: float = setting(3.0, "how often each example is seen", above=0.0)
    max_steps: int | None = setting(None, "steps to take, in place of --epochs", low=1)
    batch_size: int = setting(4, "examples a batch", low=1)
    accumulate: int = setting(1, "batches a step", low=1)
    learning_rate: float | None = setting(
        None, "the highest learning rate; default 5e-4, for --method full 5e-5", above=0.0
    )
    max_length: int = setting(1024, "tokens of an example; what is longer loses its end", low=1)
    packing: bool = setting(False, "put several examples in a row, which do not see each other")
    gradient_checkpointing: bool = setting(False, "compute activations twice to save memory")
    chat_template: str | None = setting(
        None,
        "a Jinja template for conversations; default: the tokenizer's, or a plain one",
        value="FILE",
    )
    seed: int = setting(0, "of all random numbers", low=0, high=HIGHEST_SEED)
    text_field: str | None = setting(
        None,
        "the field of JSON and datasets that has the text to train on; default: conversations, "
        "prompts with completions, or text",
    )

    def __post_init__(self) -> None:
        check_fields(self)
