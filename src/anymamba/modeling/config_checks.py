"""What each field of a config may be, and what it is stored as."""

from __future__ import annotations

import math
import numbers
import reprlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from transformers.activations import ACT2FN

from anymamba.errors import ConfigError

INIT_SCHEMES = ("random", "uniform", "constant")
"""How `dt_proj.weight` starts; "random" and "uniform" are two names of one scheme."""


def shown_value(value: object) -> str:
    """The value in one short line, whatever it is."""
    return " ".join(reprlib.repr(value).split())


class _Setting(NamedTuple):
    """What a field of the config takes: in words, as a test, and how a value is stored."""

    expected: str
    accepts: Callable[[Any], bool]
    store: Callable[[Any], Any] = lambda value: value

    def check(self, name: str, value: Any) -> Any:
        """The value as it is stored, if the field takes it."""
        if not self.accepts(value):
            raise ConfigError(f"{name} must be {self.expected}, got {shown_value(value)}")
        return self.store(value)


def _is_integer(value: Any, low: int) -> bool:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return whole and bool(value >= low)


def _is_real(value: Any) -> bool:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and math.isfinite(value)


def _are_token_ids(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(_is_integer(item, 0) for item in value)
    return value is None or _is_integer(value, 0)


def _are_limits(value: Any) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 2:
        return False
    if not all(isinstance(v, numbers.Real) and not isinstance(v, bool) for v in value):
        return False
    return bool(0 <= value[0] <= value[1])


def _is_dtype(value: Any) -> bool:
    named = getattr(torch, value, None) if isinstance(value, str) else value
    return value is None or isinstance(named, torch.dtype)


# NumPy's numbers become Python's, and whole numbers for real-valued fields become floats:
# json.dumps and Transformers refuse them otherwise.


def _plain_integers(value: Any) -> Any:
    """Integers, alone or in a list; None and words stay."""
    if isinstance(value, list | tuple):
        return [int(item) for item in value]
    return value if value is None or isinstance(value, str) else int(value)


def _whole_if_possible(value: Any) -> int | float:
    factor = float(value)
    return int(factor) if factor == int(factor) else factor


def _one_of(known: Collection[str]) -> _Setting:
    expected = f"one of {', '.join(sorted(known))}"
    return _Setting(expected, lambda value: isinstance(value, str) and value in known)


_INTEGER = _Setting("an integer >= 1", lambda value: _is_integer(value, 1), int)
_POSITIVE = _Setting("a finite number > 0", lambda value: _is_real(value) and value > 0, float)
_NOT_NEGATIVE = _Setting(
    "a finite number >= 0", lambda value: _is_real(value) and value >= 0, float
)
_BOOLEAN = _Setting("True or False", lambda value: isinstance(value, bool))
_MAYBE_BOOLEAN = _Setting("True or False", lambda value: value is None or isinstance(value, bool))
_TOKEN_ID = _Setting(
    "an integer >= 0 or None", lambda value: value is None or _is_integer(value, 0), _plain_integers
)
SETTINGS: Mapping[str, _Setting] = {
    "vocab_size": _INTEGER,
    "hidden_size": _INTEGER,
    "state_size": _INTEGER,
    "num_hidden_layers": _INTEGER,
    "layer_norm_epsilon": _NOT_NEGATIVE,
    "mixer_rms_eps": _NOT_NEGATIVE,
    "pad_token_id": _TOKEN_ID,
    "bos_token_id": _TOKEN_ID,
    "eos_token_id": _Setting(
        "an integer >= 0, a list of them, or None", _are_token_ids, _plain_integers
    ),
    "expand": _POSITIVE._replace(store=_whole_if_possible),
    "conv_kernel": _INTEGER,
    **dict.fromkeys(("num_heads", "head_dim", "n_groups", "chunk_size"), _INTEGER),
    "time_step_limit": _Setting(
        "two numbers, the smaller one first",
        _are_limits,
        lambda value: (float(value[0]), float(value[1])),
    ),
    "use_gated_norm": _BOOLEAN,
    "gate_after_norm": _BOOLEAN,
    "use_bias": _BOOLEAN,
    "use_conv_bias": _BOOLEAN,
    "hidden_act": _one_of(ACT2FN),
    "initializer_range": _NOT_NEGATIVE,
    "residual_in_fp32": _BOOLEAN,
    "time_step_rank": _Setting(
        "'auto' or an integer >= 1",
        lambda value: value == "auto" or _is_integer(value, 1),
        _plain_integers,
    ),
    "time_step_scale": _POSITIVE,
    "time_step_min": _POSITIVE,
    "time_step_max": _POSITIVE,
    "time_step_init_scheme": _one_of(INIT_SCHEMES),
    "time_step_floor": _NOT_NEGATIVE,
    "rescale_prenorm_residual": _BOOLEAN,
    "use_cache": _BOOLEAN,
    "use_mambapy": _BOOLEAN,
    "use_associative_scan": _BOOLEAN,
    "tie_word_embeddings": _BOOLEAN,
    "dtype": _Setting("a torch.dtype, its name, or None", _is_dtype),
    "output_hidden_states": _MAYBE_BOOLEAN,
    "return_dict": _MAYBE_BOOLEAN,
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
