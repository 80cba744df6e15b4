"""The native core as the runtime uses it: is it there, and how many threads does it use?"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from anymamba.arithmetic import load_core
from anymamba.checkpoint import model_shape
from anymamba.checkpoint.architecture import MAMBA2, architecture_of
from anymamba.errors import BackendError, ConfigError, InputError, MissingDependencyError
from anymamba.processors import available_processors

MOST_THREADS = 1024
"""More would be a mistake: no machine has so many cores, and each thread takes memory."""


def core() -> Any:
    """The native core.

    Raises:
        MissingDependencyError: the package was installed without it.
        BackendError: this machine lacks the instruction set that `ANYMAMBA_ISA` names.

    Example:
        >>> core().threads() >= 1
        True
    """
    try:
        return load_core()
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "AnyMamba was installed without its native core, which its runtime needs: have a C++ "
            "compiler (GCC or Clang) and run `pip install --force-reinstall --no-cache-dir "
            "anymamba`; or run the model in PyTorch: pip install 'anymamba[torch]'"
        ) from error


def epsilon_of(
    config: Mapping[str, Any],
    remedy: str = "MambaForCausalLM computes others (pip install 'anymamba[torch]')",
) -> float:
    """The norms' epsilon of a model that the native core computes.

    Args:
        config: fields in Transformers' names.
        remedy: what to do about a model with another activation.

    Raises:
        ConfigError: the core does not compute such a model: it has another activation, or an
            epsilon that makes no sense.

    Example:
        >>> epsilon_of({"hidden_act": "silu"})
        1e-05
    """
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ConfigError(
            f"the config has hidden_act {activation!r}, and the native core computes 'silu' only; "
            + remedy
        )
    return _epsilon(config, "layer_norm_epsilon", 1e-5)


def mixer_epsilon_of(config: Mapping[str, Any]) -> float | None:
    """The epsilon of the norms inside a mixer, or None where the model has none.

    Args:
        config: fields in Transformers' names.

    Raises:
        ConfigError: it makes no sense.

    Example:
        >>> mixer_epsilon_of({"model_type": "falcon_mamba"}), mixer_epsilon_of({})
        (1e-06, None)
    """
    architecture = architecture_of(config)
    if architecture is MAMBA2:
        return epsilon_of(config)
    return _epsilon(config, "mixer_rms_eps", 1e-6) if architecture.norms_maps else None


def head_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the native core must know of a model's heads beside its tensors, as it names them.

    Args:
        config: fields in Transformers' names.

    Raises:
        ConfigError: the limits of the step size make no sense.

    Example:
        >>> head_settings({"model_type": "mamba2", "n_groups": 2})
        {'groups': 2, 'dt_limit': (0.0, inf), 'norm_before_gate': False}
        >>> head_settings({})
        {}
    """
    if architecture_of(config) is not MAMBA2:
        return {}
    limits = config.get("time_step_limit", (0.0, math.inf))
    is_pair = isinstance(limits, list | tuple) and len(limits) == 2
    if not is_pair or not all(type(limit) in (int, float) for limit in limits):
        raise ConfigError(f"the config has time_step_limit {limits!r}, expected two numbers")
    low, high = map(float, limits)
    if not 0 <= low <= high:
        raise ConfigError(
            f"the config has time_step_limit {limits!r}, expected the least and the largest step"
        )
    before = config.get("gate_after_norm", False)
    groups = model_shape(config).groups  # which also refuses other values than true and false
    return {"groups": groups, "dt_limit": (low, high), "norm_before_gate": before}


def _epsilon(config: Mapping[str, Any], name: str, default: float) -> float:
    epsilon = config.get(name, default)
    if type(epsilon) not in (int, float) or not 0 <= epsilon < 1:
        raise ConfigError(f"the config has {name} {epsilon!r}, expected 0 to 1")
    return float(epsilon)


def wanted_threads(threads: int | None) -> int:
    """How many threads to compute with.

    Args:
        threads: as many, or None for `ANYMAMBA_NUM_THREADS`, or if that is not set, as many as
            there are processors for this process, its affinity and its quota considered.

    Raises:
        InputError: the number is no whole number from 1 to `MOST_THREADS`.
        BackendError: that in the environment is not.

    Example:
        >>> wanted_threads(2)
        2
    """
    if threads is not None:
        if type(threads) is not int or not 1 <= threads <= MOST_THREADS:
            raise InputError(
                f"threads must be a whole number from 1 to {MOST_THREADS}, got {threads!r}"
            )
        return threads
    text = os.environ.get("ANYMAMBA_NUM_THREADS")
    if not text:
        return available_processors()
    # Python refuses to read numbers of thousands of digits.
    if not text.isdecimal() or len(text) > 9 or not 1 <= int(text) <= MOST_THREADS:
        raise BackendError(
            f"ANYMAMBA_NUM_THREADS is {text[:80]!r}, expected a whole number of threads, 1 to "
            f"{MOST_THREADS}"
        )
    return int(text)
