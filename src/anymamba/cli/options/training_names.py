"""Options of `train` and `finetune` that mean the same: each command takes the names of both."""

from __future__ import annotations

__all__ = ["names_of"]

# A setting of `anymamba train`, which is its name in YAML too, and what else it is called.
_OTHER_NAMES = {
    "validation_data": ("--validation",),
    "steps": ("--max-steps",),
    "batch": ("--batch-size",),
    "accumulation": ("--accumulate",),
    "window": ("--max-length",),
    "model": ("-m",),
    "output": ("-o",),
}


def names_of(setting: str) -> tuple[str, ...]:
    """The options that set it, the first of which is the setting's own name.

    Args:
        setting: a setting of `anymamba train`.

    Example:
        >>> names_of("batch")
        ('--batch', '--batch-size')
    """
    return (f"--{setting.replace('_', '-')}", *_OTHER_NAMES.get(setting, ()))
