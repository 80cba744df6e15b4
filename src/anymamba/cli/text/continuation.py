"""What a model wrote, and how long it took."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Continuation"]


@dataclass(frozen=True)
class Continuation:
    """What a model wrote.

    Args:
        text: what was shown.
        prompt_ids: the tokens that it continues.
        ids: the tokens that it wrote, those of a stop string included.
        ended_by: "stop" by a stop string, "end" by an end token, "length" by the limit.
        prompt_seconds: reading the prompt, up to the first token.
        new_seconds: the tokens after the first.
    """

    text: str
    prompt_ids: list[int]
    ids: list[int]
    ended_by: str
    prompt_seconds: float
    new_seconds: float
