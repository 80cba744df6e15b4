"""Which model a state belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from anymamba.checkpoint import state_identity


class Identity:
    """A model's sizes, and a digest of its weights, which is computed once it is asked for.

    Args:
        config: the config's fields in Transformers' names.
        vocabulary: how many tokens the model has.
        compute_digest: reads all weights to tell which they are.

    Attributes:
        sizes: the fields that decide the shapes of a state.

    Example:
        >>> identity = Identity({"hidden_size": 8}, 50280, lambda: "4e05fedd")
        >>> identity.sizes["intermediate_size"], identity.digest
        (16, '4e05fedd')
    """

    def __init__(
        self, config: Mapping[str, Any], vocabulary: int, compute_digest: Callable[[], str]
    ) -> None:
        self.sizes = state_identity(config)
        self.vocabulary = vocabulary
        self._compute_digest = compute_digest
        self._digest: str | None = None

    @property
    def digest(self) -> str:
        """64 hexadecimal digits. Computing them takes about a second per gigabyte."""
        if self._digest is None:
            self._digest = self._compute_digest()
        return self._digest
