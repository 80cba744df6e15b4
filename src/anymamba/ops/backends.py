"""Which implementation of an operator runs: one table, one choice, nothing in silence.

An operator has one implementation for each backend that offers it. `"auto"`, the default, takes
the first of `PREFERENCE` that is installed, fits the tensors' device and supports the call. Any
other choice is a demand: if it cannot be met, a `BackendError` says why and what to install.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from anymamba.errors import BackendError
from anymamba.ops.tracing import is_transformed
from anymamba.ops.triton import is_available, triton_devices, why_too_old
from anymamba.upstream import PACKAGES, is_original_installed


@dataclass(frozen=True)
class Backend:
    """What one backend needs, and where its operators live.

    `devices` are the types of device that it runs on; none means all. `operators` maps an operator
    to `module:function`; the module is imported at first use. `unsupported_reason`, where given,
    names a function of the operator's name and the call's arguments that returns why the backend
    cannot serve it, or None. `prefers_other` names one that says whether another serves it better,
    which the automatic choice asks and a demand does not. `description` names one that says how the
    backend would run here. `obstacle` is what else is in the way on this machine.
    """

    devices: tuple[str, ...]
    packages: tuple[str, ...]
    install: str
    operators: dict[str, str]
    unsupported_reason: str | None = None
    prefers_other: str | None = None
    description: str | None = None
    obstacle: str | None = None

    def missing(self) -> str | None:
        """The reason why this machine cannot run the backend, or None."""
        absent = self.absent()
        if absent is not None:
            return absent
        if self.devices and not any(is_available(device) for device in self.devices):
            return f"this machine has no {' or '.join(self.devices)} device that PyTorch can use"
        return None

    def absent(self) -> str | None:
        """What is missing but a device, or None. A tensor on a device shows that there is one."""
        absent = [name for name in self.packages if not INSTALLED[name]]
        return f"{' and '.join(absent)} not installed: {self.install}" if absent else self.obstacle


PREFERENCE = ("mamba_ssm", "triton", "cpu", "mambapy", "reference")
BACKENDS = {
    "cpu": Backend(
        devices=("cpu",),
        packages=("anymamba._core",),
        install="install a C++ compiler (Debian: apt install g++), then anymamba again",
        operators={
            "selective_scan": "anymamba.ops.scan.native:selective_scan",
            "selective_state_update": "anymamba.ops.scan.native:selective_state_update",
            "ssd": "anymamba.ops.ssd.native:ssd",
            "ssd_state_update": "anymamba.ops.ssd.native:ssd_state_update",
            "causal_conv1d": "anymamba.ops.conv.native:causal_conv1d",
            "causal_conv1d_update": "anymamba.ops.conv.native:causal_conv1d_update",
            "rms_norm": "anymamba.ops.norm.native:rms_norm",
            "linear": "anymamba.ops.linear.native:linear",
            "quantized_linear": "anymamba.ops.quantized_linear.native:quantized_linear",
        },
        unsupported_reason="anymamba.ops.native:unsupported_reason",
        prefers_other="anymamba.ops.native:prefers_other",
        description="anymamba.ops.native:description",
    ),
    "mamba_ssm": Backend(
        devices=("cuda",),
        packages=("mamba_ssm", "causal_conv1d"),
        install="pip install mamba-ssm causal-conv1d",
        operators={
            "selective_scan": "anymamba.ops.scan.mamba_ssm:selective_scan",
            "selective_state_update": "anymamba.ops.scan.mamba_ssm:selective_state_update",
            "ssd": "anymamba.ops.ssd.mamba_ssm:ssd",
            "ssd_state_update": "anymamba.ops.ssd.mamba_ssm:ssd_state_update",
            "causal_conv1d": "anymamba.ops.conv.mamba_ssm:causal_conv1d",
            "causal_conv1d_update": "anymamba.ops.conv.mamba_ssm:causal_conv1d_update",
        },
        unsupported_reason="anymamba.ops.mamba_ssm_limits:unsupported_reason",
        prefers_other="anymamba.ops.mamba_ssm_limits:prefers_other",
        description="anymamba.ops.mamba_ssm_limits:description",
    ),
    "triton": Backend(
        devices=triton_devices(),
        packages=("triton",),
        install="pip install triton (PyTorch's builds for GPUs bring it)",
        operators={
            "selective_scan": "anymamba.ops.scan.triton:selective_scan",
            "selective_state_update": "anymamba.ops.scan.triton:selective_state_update",
            "causal_conv1d": "anymamba.ops.conv.triton:causal_conv1d",
            "causal_conv1d_update": "anymamba.ops.conv.triton:causal_conv1d_update",
            "rms_norm": "anymamba.ops.norm.triton:rms_norm",
            "ssd": "anymamba.ops.ssd.triton:ssd",
            "ssd_state_update": "anymamba.ops.ssd.triton:ssd_state_update",
        },
        unsupported_reason="anymamba.ops.triton:unsupported_reason",
        prefers_other="anymamba.ops.triton:prefers_other",
        description="anymamba.ops.triton:description",
        obstacle=why_too_old(),
    ),
    "mambapy": Backend(
        devices=(),
        packages=("mambapy",),
        install="pip install mambapy",
        operators={"selective_scan": "anymamba.ops.scan.mambapy:selective_scan"},
    ),
    "reference": Backend(
        devices=(),
        packages=(),
        install="",
        operators={
            "selective_scan": "anymamba.ops.scan.reference:selective_scan",
            "selective_state_update": "anymamba.ops.scan.reference:selective_state_update",
            "causal_conv1d": "anymamba.ops.conv.reference:causal_conv1d",
            "causal_conv1d_update": "anymamba.ops.conv.reference:causal_conv1d_update",
            "rms_norm": "anymamba.ops.norm.reference:rms_norm",
            "linear": "anymamba.ops.linear.reference:linear",
            "quantized_linear": "anymamba.ops.quantized_linear.reference:quantized_linear",
            "ssd": "anymamba.ops.ssd.chunked:ssd",
            "ssd_state_update": "anymamba.ops.ssd.reference:ssd_state_update",
        },
    ),
}
_RENAMED = {"cuda": "mamba_ssm"}
# It needs more memory than the reference, so it runs only where it is asked for by name.
_ONLY_BY_REQUEST = frozenset({"mambapy"})


def _is_importable(name: str) -> bool:
    if name in PACKAGES:
        return is_original_installed(name)
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


# Looked up once a process, and before any function is compiled: a compiler cannot follow imports.
INSTALLED = {name: _is_importable(name) for entry in BACKENDS.values() for name in entry.packages}

_choice: ContextVar[str | None] = ContextVar("anymamba_backend", default=None)


class Chosen:
    """A choice that was made: leaving it as a context undoes it."""

    def __init__(self, variable: ContextVar[str | None], name: str) -> None:
        self._variable = variable
        self._token = variable.set(name)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self._variable.reset(self._token)


def backend(name: str | None = None) -> str | Chosen:
    """Choose the backend of all operators, or ask which is chosen.

    Args:
        name: `"auto"` or one of the names that `available_backends` lists. None asks.

    Returns:
        Without a name the current choice: the last one made here, else the environment variable
        `ANYMAMBA_BACKEND`, else `"auto"`. With a name, a handle that may be used as a context
        manager; without `with`, the choice stays.

    Raises:
        BackendError: the name is unknown, or the backend cannot run on this machine.

    Example:
        >>> from anymamba import ops
        >>> with ops.backend("reference"):
        ...     ops.backend()
        'reference'
    """
    if name is None:
        current: str = _current()
        return current
    return Chosen(_choice, _demand(name, "anymamba.ops.backend"))


def available_backends() -> list[tuple[str, bool, str]]:
    """Every backend in order of preference: its name, whether it can run here, and why (not)."""
    rows = []
    for name in PREFERENCE:
        entry = BACKENDS[name]
        reason = entry.missing()
        offers = "all operators" if name == "reference" else ", ".join(entry.operators)
        if entry.description is not None and reason is None:
            offers += f"; {_load(entry.description)()}"
        rows.append((name, reason is None, reason or f"offers {offers}"))
    return rows


def implementation(
    operator: str, arguments: Sequence[Any], name: str | None = None, fallback: str = "reference"
) -> Callable[..., Any]:
    """The function that serves one call of an operator.

    Args:
        operator: its name in the table.
        arguments: the call's arguments, which a backend may decline; the first one is a tensor
            whose device decides.
        name: a choice for this call alone.
        fallback: what the automatic choice takes where no kernel serves the call.

    Raises:
        BackendError: the chosen backend cannot serve the call.
    """
    chosen = _current() if name is None else _demand(name, operator)
    if chosen != "auto" and operator in BACKENDS[chosen].operators:
        reason = _unsupported_reason(chosen, operator, arguments)
        if reason is not None:
            raise BackendError(f"backend {chosen!r} cannot run {operator}: {reason}")
        return _load(BACKENDS[chosen].operators[operator])
    device = _device_type(arguments[0])
    for candidate in PREFERENCE:
        by_request = candidate in _ONLY_BY_REQUEST and candidate != fallback
        entry = BACKENDS[candidate]
        if by_request or operator not in entry.operators:
            continue
        if entry.devices and device not in entry.devices:
            continue
        if _prefers_other(candidate, operator, arguments):
            continue
        if _unsupported_reason(candidate, operator, arguments) is None:
            on_cpu = arguments[0].device.type == "cpu"
            native = operator in BACKENDS["cpu"].operators and on_cpu
            if native and candidate != "cpu":
                _say_once_that_the_core_is_missing()
            return _load(BACKENDS[candidate].operators[operator])
    raise BackendError(f"no backend can run {operator} on {arguments[0].device}")


def native_is_chosen() -> bool:
    """Whether the native core serves the calls that it can serve.

    Example:
        >>> from anymamba import ops
        >>> with ops.backend("reference"):
        ...     native_is_chosen()
        False
    """
    return _current() in ("auto", "cpu") and BACKENDS["cpu"].missing() is None


# A compiled function keeps the choice that was in force when it was compiled.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _current() -> str:
    return _choice.get() or _from_environment()


@cache
def _say_once_that_the_core_is_missing() -> None:
    reason = BACKENDS["cpu"].missing()
    if reason is not None:
        warnings.warn(
            f"AnyMamba runs on PyTorch code, many times slower than its native core: {reason}",
            RuntimeWarning,
            stacklevel=4,
        )


def _from_environment() -> str:
    name = os.environ.get("ANYMAMBA_BACKEND", "auto")
    return _demand(name, "the environment variable ANYMAMBA_BACKEND")


def _demand(name: str, who: str) -> str:
    """The name of a backend that was asked for, which can run here."""
    if name in _RENAMED:
        old, name = name, _RENAMED[name]
        message = f"{who}: the backend {old!r} is called {name!r} now"
        warnings.warn(message, DeprecationWarning, stacklevel=4)
    if name == "auto":
        return name
    if name not in BACKENDS:
        known = ", ".join(["auto", *PREFERENCE])
        raise BackendError(f"{who}: unknown backend {name!r}; choose one of {known}")
    reason = BACKENDS[name].missing()
    if reason is not None:
        raise BackendError(f"{who}: backend {name!r} cannot run here: {reason}")
    return name


def _device_type(tensor: Tensor) -> str:
    # On the meta device the core's operators only tell shapes.
    return "cpu" if tensor.is_meta else tensor.device.type


def _unsupported_reason(name: str, operator: str, arguments: Sequence[Any]) -> str | None:
    entry, tensor = BACKENDS[name], arguments[0]
    if entry.devices and _device_type(tensor) not in entry.devices:
        return f"the tensors are on {tensor.device}, not on {' or '.join(entry.devices)}"
    if name != "reference" and is_transformed():
        return "torch.func and forward-mode derivatives need the backend 'auto' or 'reference'"
    absent = entry.absent()
    if absent is not None or entry.unsupported_reason is None:
        return absent
    reason: str | None = _load(entry.unsupported_reason)(operator, arguments)
    return reason


def _prefers_other(name: str, operator: str, arguments: Sequence[Any]) -> bool:
    entry = BACKENDS[name]
    if entry.prefers_other is None or entry.absent() is not None:
        return False
    return bool(_load(entry.prefers_other)(operator, arguments))


def _load(place: str) -> Callable[..., Any]:
    if place in _loaded:
        return _loaded[place]
    _import(place)
    # Not from the dict, of which a compiler keeps what it saw first.
    function: Callable[..., Any] = getattr(_late, place.replace(".", "_").replace(":", "_"))
    return function


# A compiler cannot follow imports; one that is due while it traces is carried out then.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _import(place: str) -> bool:
    module, _, name = place.partition(":")
    _loaded[place] = getattr(importlib.import_module(module), name)
    setattr(_late, place.replace(".", "_").replace(":", "_"), _loaded[place])
    return True


_loaded: dict[str, Callable[..., Any]] = {}
_late = SimpleNamespace()
# Ours are loaded ahead; Triton and others' packages take long to import.
for _entry in (BACKENDS["cpu"], BACKENDS["reference"]):
    _places = (*_entry.operators.values(), _entry.unsupported_reason, _entry.prefers_other)
    for _place in filter(None, _places if _entry.missing() is None else ()):
        _load(_place)
