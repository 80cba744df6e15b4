"""What each field of a config may be, and what it is stored as.

NumPy's numbers become Python's, and whole numbers for real-valued fields become floats: json.dumps
and Transformers refuse them otherwise.
"""

from __future__ import annotations

import math
import numbers
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.activations import ACT2FN

from anymamba.errors import ConfigError

INIT_SCHEMES = ("random", "uniform", "constant")
"""How `dt_proj.weight` starts; "random" and "uniform" are two names of one scheme."""


def shown_value(value: object) -> str:
    """The value in one short line, whatever it is."""
    return " ".join(reprlib.repr(value).split())


def _refuse(name: str, expected: str, value: object) -> ConfigError:
    return ConfigError(f"{name} must be {expected}, got {shown_value(value)}")


def _is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _integer(name: str, value: Any, low: int = 1) -> int:
    if not _is_integer(value) or value < low:
        raise _refuse(name, f"an integer >= {low}", value)
    return int(value)


def _real(name: str, value: Any, zero_allowed: bool) -> float:
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_real or not math.isfinite(value) or value < 0 or (value == 0 and not zero_allowed):
        raise _refuse(name, f"a finite number {'>=' if zero_allowed else '>'} 0", value)
    return float(value)


def _positive(name: str, value: Any) -> float:
    return _real(name, value, zero_allowed=False)


def _not_negative(name: str, value: Any) -> float:
    return _real(name, value, zero_allowed=True)


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _refuse(name, "True or False", value)
    return value


def _boolean_or_none(name: str, value: Any) -> bool | None:
    return None if value is None else _boolean(name, value)


def _token_id(name: str, value: Any) -> int | None:
    if value is not None and (not _is_integer(value) or value < 0):
        raise _refuse(name, "an integer >= 0 or None", value)
    return value if value is None else int(value)


def _token_ids(name: str, value: Any) -> int | list[int] | None:
    if not isinstance(value, list | tuple):
        return _token_id(name, value)
    if not value or not all(_is_integer(item) and item >= 0 for item in value):
        raise _refuse(name, "an integer >= 0, a list of them, or None", value)
    return [int(item) for item in value]


def _rank(name: str, value: Any) -> int | str:
    if value == "auto" and isinstance(value, str):
        return "auto"
    if not _is_integer(value) or value < 1:
        raise _refuse(name, "'auto' or an integer >= 1", value)
    return int(value)


def _expand(name: str, value: Any) -> int | float:
    factor = _positive(name, value)
    return int(factor) if factor == int(factor) else factor


def _limits(name: str, value: Any) -> tuple[float, float]:
    pair = tuple(value) if isinstance(value, list | tuple) else ()
    numbers_alone = all(isinstance(v, numbers.Real) and not isinstance(v, bool) for v in pair)
    if len(pair) != 2 or not numbers_alone or not 0 <= pair[0] <= pair[1]:
        raise _refuse(name, "two numbers, the smaller one first", value)
    return float(pair[0]), float(pair[1])


def _activation(name: str, value: Any) -> str:
    if not isinstance(value, str) or value not in ACT2FN:
        raise _refuse(name, f"one of {', '.join(sorted(ACT2FN))}", value)
    return value


def _init_scheme(name: str, value: Any) -> str:
    if not isinstance(value, str) or value not in INIT_SCHEMES:
        raise _refuse(name, f"one of {', '.join(INIT_SCHEMES)}", value)
    return value


def _dtype(name: str, value: Any) -> Any:
    named = getattr(torch, value, None) if isinstance(value, str) else value
    if named is not None and isinstance(named, torch.dtype):
        return value
    if value is None:
        return None
    raise _refuse(name, "a torch.dtype, its name, or None", value)


CHECKS: Mapping[str, Callable[[str, Any], Any]] = {
    "vocab_size": _integer,
    "hidden_size": _integer,
    "state_size": _integer,
    "num_hidden_layers": _integer,
    "layer_norm_epsilon": _not_negative,
    "mixer_rms_eps": _not_negative,
    "pad_token_id": _token_id,
    "bos_token_id": _token_id,
    "eos_token_id": _token_ids,
    "expand": _expand,
    "conv_kernel": _integer,
    "num_heads": _integer,
    "head_dim": _integer,
    "n_groups": _integer,
    "chunk_size": _integer,
    "time_step_limit": _limits,
    "use_bias": _boolean,
    "use_conv_bias": _boolean,
    "hidden_act": _activation,
    "initializer_range": _not_negative,
    "residual_in_fp32": _boolean,
    "time_step_rank": _rank,
    "time_step_scale": _positive,
    "time_step_min": _positive,
    "time_step_max": _positive,
    "time_step_init_scheme": _init_scheme,
    "time_step_floor": _not_negative,
    "rescale_prenorm_residual": _boolean,
    "use_cache": _boolean,
    "use_mambapy": _boolean,
    "use_associative_scan": _boolean,
    "tie_word_embeddings": _boolean,
    "dtype": _dtype,
    "output_hidden_states": _boolean_or_none,
    "return_dict": _boolean_or_none,
}


def check_together(settings: Mapping[str, Any], changed: str) -> None:
    """Refuse values that each are fine and together are not, once all of them are there."""
    if changed in ("hidden_size", "expand") and {"hidden_size", "expand"} <= settings.keys():
        width = settings["expand"] * settings["hidden_size"]
        if width != int(width) or width < 1:
            raise ConfigError(
                f"expand={settings['expand']} times hidden_size="
                f"{settings['hidden_size']} is {width}, and the inner width must be a whole number"
            )
    steps = ("time_step_min", "time_step_max", "time_step_floor")
    if changed in steps and set(steps) <= settings.keys():
        for name in ("time_step_min", "time_step_floor"):
            if settings[name] > settings["time_step_max"]:
                raise ConfigError(
                    f"{name}={settings[name]} must not exceed "
                    f"time_step_max={settings['time_step_max']}; set the larger one first"
                )
