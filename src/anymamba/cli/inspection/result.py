"""What `anymamba inspect` shows, whatever it is drawn with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from anymamba.runtime.analysis import Inspection
    from anymamba.runtime.engine import Engine

VISIBLE = str.maketrans({" ": "␣", "\n": "↵", "\t": "→"})
TOKENS_BEFORE = 12


@dataclass(frozen=True)
class Inspected:
    """A text that was looked at.

    Args:
        found: the figures.
        names: how each token is shown.
        after: how many tokens later it is looked at what is left.
        model: how the model is called.
    """

    found: Inspection
    names: list[str]
    after: int
    model: str

    def held_l(self) -> NDArray[np.float64]:
        """How much more is left of each token than of the average one, averaged over layers.

        Of the last tokens, which never are so old, nothing is known: NaN.
        """
        mean_l: NDArray[np.float64] = self.found.held_yl(self.after).mean(axis=0)
        return mean_l

    def most_held(self, count: int) -> list[tuple[int, float]]:
        """The places of the tokens that are held on to most, and how much."""
        held_l = self.held_l()[: len(self.names) - self.after]
        places = np.argsort(-held_l, kind="stable")[:count]
        return [(int(place), float(held_l[place])) for place in places]

    def in_context(self, place: int) -> str:
        """A token in brackets, after some that come before it."""
        before = "".join(self.names[max(0, place - TOKENS_BEFORE) : place])
        return f"{place:5}  {before}[{self.names[place]}]"

    def as_json(self) -> dict[str, Any]:
        """All figures, with null for what the text is too short to tell."""
        found = self.found
        return {
            "tokens": [
                {"id": id, "text": name} for id, name in zip(found.ids, self.names, strict=True)
            ],
            "after": self.after,
            "ages": list(found.ages),
            "step_size": numbers(found.step_sizes_yl),
            "retention": numbers(found.retention_yal),
            "forgetting": numbers(found.forgetting_ya()),
            "held": numbers(found.held_yl(self.after)),
            "share_of_final_state": numbers(found.final_share_yl),
        }


def names_of(engine: Engine, ids: Sequence[int]) -> list[str]:
    """Each token as a text that can be seen: a blank is ␣, a line's end ↵."""
    names = []
    for id in ids:
        text = engine.detokenize([id], skip_special=False)
        if not text or "\N{REPLACEMENT CHARACTER}" in text:  # a part of a character
            text = engine.tokenizer.id_to_token(id) or f"<{id}>"
        names.append("".join(c if c.isprintable() else "·" for c in text.translate(VISIBLE)))
    return names


def numbers(array: NDArray[np.float64]) -> Any:
    """For JSON, with six digits."""
    if array.ndim:
        return [numbers(part) for part in array]
    value = float(array)
    return float(f"{value:.6g}") if math.isfinite(value) else None
