"""How likely the tokens of a prompt are, found while it is read."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from anymamba.runtime.generation.logits_processors import likeliest, log_normalizer
from anymamba.runtime.generation.token_generator import TopLogprobs


class PromptScores:
    """Log-probabilities of a prompt's tokens, each given all before it.

    Args:
        top: how many of the likeliest tokens are told for each.

    Example:
        >>> scores = PromptScores(top=1)
        >>> scores.add(None, np.array([1, 0]), np.log(np.float32([[1, 3], [1, 1]])))
        >>> [logprob and round(logprob, 4) for logprob in scores.logprobs], scores.top[1][0][0]
        ([None, -1.3863], 1)
    """

    def __init__(self, top: int) -> None:
        self.logprobs: list[float | None] = []
        self.top: list[TopLogprobs] = []
        self._count = top

    def add(
        self,
        before_v: NDArray[np.float32] | None,
        ids_l: NDArray[np.int64],
        logits_lv: NDArray[np.float32],
    ) -> None:
        """Take in the next tokens.

        Args:
            before_v: the logits before the first of them; None where nothing was read before, so
                that nothing says how likely it is.
            ids_l: the tokens.
            logits_lv: the logits after each of them.
        """
        rows = [before_v, *logits_lv[:-1]]
        for id, logits_v in zip(ids_l.tolist(), rows, strict=True):
            self._add(id, logits_v)

    def _add(self, id: int, logits_v: NDArray[np.float32] | None) -> None:
        if logits_v is None:
            self.logprobs.append(None)
            self.top.append(())
            return
        normalizer = log_normalizer(logits_v)
        self.logprobs.append(float(logits_v[id] - normalizer))
        self.top.append(likeliest(logits_v, normalizer, self._count))
