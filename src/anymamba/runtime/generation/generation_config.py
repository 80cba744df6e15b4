"""The sampling that a model's generation_config.json suggests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anymamba.checkpoint.io import shown
from anymamba.errors import CheckpointError, InputError
from anymamba.runtime.generation.sampling_settings import Sampling

_CHOOSING = ("temperature", "top_k", "top_p", "min_p", "typical_p")


def suggested_sampling(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """Take the fields of `Sampling` that a generation_config.json sets.

    Transformers draws tokens only where the file says `do_sample`; without it, temperature and
    the like suggest nothing, and they are left out.

    Args:
        generation_config: the file's fields; empty where there is no file.

    Returns:
        Fields for `Sampling`, those that are set only.

    Raises:
        CheckpointError: a value makes no sense.

    Example:
        >>> suggested_sampling({"do_sample": True, "temperature": 0.7, "top_p": None})
        {'temperature': 0.7}
        >>> suggested_sampling({"temperature": 0.7, "repetition_penalty": 1.1})
        {'repetition_penalty': 1.1}
    """
    draws = generation_config.get("do_sample") is True
    names = (*(_CHOOSING if draws else ()), "repetition_penalty")
    found = {name: generation_config.get(name) for name in names}
    if draws and found["temperature"] is None:
        found["temperature"] = 1.0  # Transformers' default
    kept = {name: value for name, value in found.items() if value is not None}
    try:
        Sampling(**kept)
    except InputError as error:
        raise CheckpointError(f"generation_config.json: {error}; got {shown(kept)}") from None
    return kept
