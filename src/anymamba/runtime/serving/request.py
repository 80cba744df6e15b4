"""A client's request to the scheduler, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from anymamba.errors import AnyMambaError
from anymamba.runtime.generation import (
    Embedding,
    Pooling,
    PromptScores,
    Sampling,
    TokenGenerator,
    TokenOutput,
)
from anymamba.runtime.serving.prefix_cache import Key, TokenHash
from anymamba.runtime.state import State


@dataclass(frozen=True)
class Request:
    """What a client wants.

    Args:
        ids: the text's tokens; with `state` those behind what it has read.
        sampling: how it is continued; None where it is only to be read.
        model: which of the scheduler's engines, by name.
        client: whose turn it is. One with a name may take half of the queue.
        state: what was read before. It stays as it is.
        keep_at: counts of tokens of `ids` after which the state is worth keeping, such as the end
            of a chat's instructions. The ends of the prompt and of the answer are kept in any case.
        pooling: makes a vector of the text, which is then neither continued nor kept.
        row: which of several answers to one prompt this is; it draws with the seed `seed + row`.
        scores: gets the log-probabilities of the tokens of `ids`, all of which are then read.

    Example:
        >>> Request(np.array([72, 105]), Sampling(max_new_tokens=5), "bundled").client
        ''
    """

    ids: NDArray[np.int64]
    sampling: Sampling | None
    model: str
    client: str = ""
    state: State | None = None
    keep_at: Sequence[int] = ()
    row: int = 0
    pooling: Pooling | None = None
    scores: PromptScores | None = None


@dataclass(frozen=True)
class Started:
    """A request got a row.

    Args:
        cached_tokens: how many tokens need not be read again.
        miss: why no more were, as `Found` has it; None where nothing was missing or asked.
    """

    cached_tokens: int
    miss: str | None


Event: TypeAlias = Started | TokenOutput | Embedding | State | AnyMambaError
"""What comes of a request: that it started, its tokens, of a text that is only read its state or
its vector, or what went wrong. The last token has a finish reason; after it, a state, a vector or
an error no more events come."""

Listener: TypeAlias = Callable[[Event], object]


@dataclass(eq=False)
class Submission:
    """A request on its way. `cancel` ends it, from any thread, within a step."""

    request: Request
    listener: Listener
    generator: TokenGenerator | Pooling | None
    answer: list[int] = field(default_factory=list)
    keep_at: set[int] = field(default_factory=set)
    cancelled: bool = False
    _read: TokenHash = field(default_factory=TokenHash)

    def cancel(self) -> None:
        """End it: its row is free after the step that runs now, and no more events come."""
        self.cancelled = True

    def key_after(self, count: int) -> Key:
        """The key of the text's first tokens, so many; never fewer than the last time."""
        prompt, start = self.request.ids, self._read.count
        self._read.add(prompt[start:count])
        if count > prompt.size:
            new = self.answer[self._read.count - prompt.size : count - prompt.size]
            self._read.add(np.array(new, np.int64))
        return self._read.key

    def tell(self, event: Event) -> None:
        """Let the listener know, unless nobody listens any more."""
        if self.cancelled:
            return
        try:
            self.listener(event)
        except Exception:  # a client that is gone may not end the others'
            self.cancelled = True
