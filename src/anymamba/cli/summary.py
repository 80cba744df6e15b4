"""How fast it went and how much memory it took."""

from __future__ import annotations

import sys
from pathlib import Path

from anymamba.cli.text.continuation import Continuation


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


def peak_memory() -> int | None:
    """The most memory that this process has held, in bytes; None where the system cannot say."""
    try:
        # Linux counts what the process had before it became this program into `ru_maxrss`.
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        (most,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
        return int(most) * 1024
    except (OSError, ValueError):
        return most_resident()


def most_resident() -> int | None:
    """The same, as other systems tell it."""
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts in bytes, others in kilobytes.
    return most if sys.platform == "darwin" else most * 1024
