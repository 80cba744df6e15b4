"""What release 0.1 called some things of an engine."""

from __future__ import annotations

from abc import ABC, abstractmethod

from anymamba.renamed import warn_renamed
from anymamba.runtime.prefill import Progress
from anymamba.runtime.prompts import Text
from anymamba.runtime.state import State


class OldNames(ABC):
    """The old names of an `Engine`, which warn.

    Example:
        >>> import anymamba, warnings
        >>> engine = anymamba.load()
        >>> with warnings.catch_warnings(record=True):
        ...     engine.weights_kind, engine.feed(engine.state(), "ROMEO:").token_count
        ('bf16', 6)
    """

    weight_type: str

    @abstractmethod
    def prefill(self, state: State, text: Text, progress: Progress | None = None) -> State:
        """As `Engine` has it."""

    @property
    def weights_kind(self) -> str:
        """The name of `weight_type` in release 0.1."""
        warn_renamed("Engine.weights_kind", "Engine.weight_type")
        return self.weight_type

    def feed(self, state: State, text: Text, progress: Progress | None = None) -> State:
        """The name of `prefill` in release 0.1."""
        warn_renamed("Engine.feed", "Engine.prefill")
        return self.prefill(state, text, progress)
