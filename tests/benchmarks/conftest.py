"""The benchmarks are scripts, which import what lies beside them."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(FOLDER))


def load(script: str) -> ModuleType:
    """A script as a module: what it imports takes seconds in a process of its own."""
    spec = spec_from_file_location(f"benchmark_{script}", FOLDER / f"{script}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module
