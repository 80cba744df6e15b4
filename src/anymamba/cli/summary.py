"""What a model wrote, how fast, and in how much memory."""

from __future__ import annotations

from dataclasses import dataclass

from anymamba.cli.peak_memory import peak_memory

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


def figures_of(prompt_tokens: int, continuation: Continuation) -> dict[str, float | int | None]:
    """The figures of one continuation; None where there is nothing to measure.

    The first new token comes out of reading the prompt, so that it counts there and not in the
    speed of the new ones.
    """
    later_tokens = len(continuation.ids) - 1
    return {
        "prompt_tokens": prompt_tokens,
        "prompt_tokens_per_second": rate(prompt_tokens, continuation.prompt_seconds),
        "new_tokens": len(continuation.ids),
        "new_tokens_per_second": rate(later_tokens, continuation.new_seconds),
        "peak_memory_bytes": peak_memory(),
    }


def figures_line(figures: dict[str, float | int | None]) -> str:
    """The figures in words."""
    parts = []
    for kind in ("prompt", "new"):
        part = f"{kind}: {figures[f'{kind}_tokens']} tokens"
        speed = figures[f"{kind}_tokens_per_second"]
        parts.append(part if speed is None else f"{part}, {speed:.1f} tokens/s")
    memory = figures["peak_memory_bytes"]
    if memory is not None:
        parts.append(f"peak memory: {memory / 1e6:.0f} MB")
    return "; ".join(parts)


def rate(count: int, seconds: float) -> float | None:
    """How many a second."""
    return round(count / seconds, 1) if count > 0 and seconds > 0 else None
