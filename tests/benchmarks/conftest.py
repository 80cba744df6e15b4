"""The benchmarks are scripts, which import what lies beside them."""

import sys
from pathlib import Path
from types import ModuleType

from tests.support.processes import module_from

FOLDER = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(FOLDER))


def load(script: str) -> ModuleType:
    return module_from(FOLDER / f"{script}.py", f"benchmark_{script}")
