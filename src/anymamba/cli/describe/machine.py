"""What `anymamba info` says about an installation."""

from __future__ import annotations

import os
import platform
from typing import Any

from anymamba import __version__
from anymamba.arithmetic import matmul_dtype_from_environment
from anymamba.cli.describe.installation import wheel, wheel_line
from anymamba.cli.describe.instruction_sets import describe_sets, faster
from anymamba.cli.terminal.table import table
from anymamba.errors import AnyMambaError, MissingDependencyError


def describe() -> dict[str, Any]:
    """Versions, backends and the bundled model. A part that is missing says what to install."""
    torch_version, backends = torch_and_backends()
    return {
        "anymamba": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processors": os.cpu_count(),
        "threads": threads(),
        "wheel": wheel(),
        "torch": torch_version,
        "native_core": native_core(),
        **core_facts(),
        "backend": chosen_backend() if backends else None,
        "backends": backends,
        "drop_in": drop_in(),
        "bundled_model": bundled_folder(),
    }


def as_text(facts: dict[str, Any]) -> str:
    """The same for people."""
    left_out = {"backends", "instruction_sets"} | (set() if facts["backend"] else {"backend"})
    shown = {**facts, "wheel": wheel_line(facts["wheel"])}
    rows = [(name.replace("_", " "), shown[name]) for name in shown if name not in left_out]
    parts = [table(rows)]
    if facts["instruction_sets"]:
        sets = [
            (f"  {row['name']}", f"{row['state']:9}  {row['needs']}")
            for row in facts["instruction_sets"]
        ]
        parts += ["instruction sets", table(sets)]
    if facts["backends"]:
        marks = {True: "yes", False: "no"}
        backends = [
            (f"  {backend['name']}", f"{marks[backend['available']]:3}  {backend['reason']}")
            for backend in facts["backends"]
        ]
        parts += ["backends", table(backends)]
    return "\n".join(parts)


def torch_and_backends() -> tuple[str, list[dict[str, Any]]]:
    """PyTorch's version, and the backends of the operators that run on it."""
    missing = "not installed: pip install 'anymamba[torch]'"
    try:
        import torch
    except ImportError as error:
        # Anything but its absence is a broken installation, about which the message says more.
        absent = isinstance(error, ModuleNotFoundError) and error.name == "torch"
        return missing if absent else f"broken: {error}", []
    try:
        from anymamba.ops import available_backends
    except ImportError as error:
        return f"{torch.__version__}, but the operators lack a package: {error}", []
    rows = available_backends()
    return torch.__version__, [
        {"name": name, "available": available, "reason": reason} for name, available, reason in rows
    ]


def native_core() -> str:
    """The instruction set and the type of matrix products, or why there is no native core."""
    from anymamba.runtime.native import core

    try:
        isa = core().isa()
    except MissingDependencyError:
        return "not built: a C++ compiler (GCC or Clang) was not found at installation"
    return f"{isa}; bfloat16 weights are multiplied in {matmul_dtype_from_environment()}"


def core_facts() -> dict[str, Any]:
    """How the native core was compiled, its instruction sets, and what a faster one would need."""
    from anymamba.runtime.native import core

    try:
        native = core()
    except MissingDependencyError:
        return {"core_build": None, "instruction_sets": [], "faster": None}
    built, here = native.built_isas.split(), native.isas()
    sets = describe_sets(native.isa(), here, built)
    return {
        "core_build": f"{native.compiler} for {native.system}",
        "instruction_sets": sets,
        "faster": faster(sets, here[0]),
    }


def threads() -> int:
    """How many threads the runtime uses where nothing says otherwise."""
    from anymamba.runtime.native import wanted_threads

    return wanted_threads(None)


def chosen_backend() -> str:
    """The backend that `ANYMAMBA_BACKEND` asks for."""
    from anymamba.ops import backend

    return str(backend())


def drop_in() -> str:
    """Whether AnyMamba answers the imports of `mamba_ssm` and `causal_conv1d` in this process."""
    from anymamba.dropin import is_installed
    from anymamba.dropin.dispatch import answering

    if not is_installed():
        return "off: anymamba run, or anymamba.dropin.install() in a program, turns it on"
    others = f"; CUDA tensors go to {' and '.join(sorted(answering))}" if answering else ""
    return f"active: mamba_ssm and causal_conv1d are AnyMamba's{others}"


def bundled_folder() -> str:
    """Where the bundled model is, or why it is not."""
    from anymamba.assets import bundled_model

    try:
        return str(bundled_model())
    except AnyMambaError as error:
        return f"not available: {error}"
