"""What a model wrote, and how long it took."""

from __future__ import annotations

from dataclasses import dataclass

# What the command line's JSON has called it from the first release on.
_ENDED_BY = {"eos": "end"}


def ended_by(finish_reason: str | None) -> str:
    """The runtime's finish reason as the command line tells it: "stop", "end" or "length"."""
    reason = finish_reason or "length"
    return _ENDED_BY.get(reason, reason)


@dataclass(frozen=True)
class Continuation:
    """What a model wrote.

    Args:
        text: what was shown.
        prompt_ids: the tokens that it continues.
        ids: the tokens that it wrote, those of a stop string included.
        ended_by: "stop" by a stop string, "end" by an end token, "length" by the limit.
        seed: of its random numbers.
        prompt_seconds: reading the prompt, up to the first token.
        new_seconds: the tokens after the first.
    """

    text: str
    prompt_ids: list[int]
    ids: list[int]
    ended_by: str
    seed: int
    prompt_seconds: float
    new_seconds: float
