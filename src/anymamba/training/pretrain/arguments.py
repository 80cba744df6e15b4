"""Our settings in the words of Transformers' Trainer, and what follows from the machine."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from transformers import TrainingArguments

from anymamba.devices import find_device
from anymamba.training.settings import Settings

NO_END = 10**9
"""The number of steps where the clock, and not a number, ends the training."""


def chosen_device(settings: Settings) -> str:
    """`cpu`, `cuda` or `mps`.

    Raises:
        BackendError: one was asked for that this machine lacks.
    """
    return find_device(settings.device).type


def chosen_dtype(settings: Settings) -> torch.dtype:
    """The type that matrix products are computed in; weights are float32 while they train.

    `auto` is bfloat16 on GPUs that have it. On a CPU it is float32 whatever the processor has
    instructions for, so that the same command trains in the same arithmetic everywhere.
    """
    if settings.dtype != "auto":
        return torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
    device = chosen_device(settings)
    fast = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def training_arguments(settings: Settings, checkpoints: Path) -> TrainingArguments:
    """Transformers' arguments. What we log, evaluate and save, and when, is not in them."""
    return TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulation,
        max_steps=settings.steps or NO_END,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        max_grad_norm=settings.gradient_clip,
        bf16=chosen_dtype(settings) is torch.bfloat16,
        use_cpu=chosen_device(settings) == "cpu",
        activation_checkpointing=settings.gradient_checkpointing,
        torch_compile=settings.compile,
        # Each step uses all weights. To look for others costs time, and DDP warns that it does.
        ddp_find_unused_parameters=False,
        # It ends up in the stored config, and whoever generates with the model wants a state.
        use_cache=True,
        seed=settings.seed,
        # Our rows come in an order of their own, and are cheap to make.
        train_sampling_strategy="sequential",
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def rate_at(settings: Settings, share: float) -> float:
    """The learning rate when a share of the budget is spent, from 0 to 1.

    A straight rise, then half a cosine (or a straight line, or nothing) down.

    Example:
        >>> s = Settings(learning_rate=1.0, final_learning_rate=0.0, warm_up=0.5)
        >>> rate_at(s, 0.25), rate_at(s, 0.5), round(rate_at(s, 0.75), 3), rate_at(s, 1.0)
        (0.5, 1.0, 0.5, 0.0)
    """
    high, low = settings.learning_rate, settings.final_learning_rate
    if share < settings.warm_up:
        # The first step is taken at no share at all, and is not to be wasted.
        return high * max(share / settings.warm_up, 0.01)
    if settings.schedule == "constant":
        return high
    spent = min((share - settings.warm_up) / max(1.0 - settings.warm_up, 1e-9), 1.0)
    left = 1 - spent if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * spent))
    return low + left * (high - low)
