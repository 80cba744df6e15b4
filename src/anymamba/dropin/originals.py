"""The original packages, loaded apart while ours answer under their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Originals", "originals"]


class Originals:
    """Knows which original packages answer calls. None does before `install()`."""

    def __init__(self) -> None:
        self._answering: frozenset[str] = frozenset()

    def answer(self, module: str) -> bool:
        """Whether the original package of a module takes the calls that it can."""
        return bool(self._answering) and module.partition(".")[0] in self._answering

    def function(self, module: str, name: str) -> Callable[..., Any] | None:
        """The original's function, or None where its version has none of that name."""
        raise NotImplementedError


originals = Originals()
