"""Text and settings with which a training step takes milliseconds."""

from pathlib import Path
from typing import Any

from anymamba.training.settings import Settings

TEXT = "".join(f"{number} times {number} is {number * number}.\n" for number in range(200))


def write_text(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def small(folder: Path, **changes: Any) -> Settings:
    """Two layers of width 16 on a text of 4 KB."""
    given: dict[str, Any] = {
        "data": [str(write_text(folder))],
        "output": str(folder / "run"),
        "hidden_size": 16,
        "layers": 2,
        "window": 32,
        "batch": 4,
        "steps": 12,
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "log_every": 1,
        "evaluate_every": 6,
        "save_every": 5,
        "plot": False,
        "tensorboard": False,
    }
    return Settings(**{**given, **changes})
