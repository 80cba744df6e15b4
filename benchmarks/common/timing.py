"""Clocks for a machine that others use too.

All cases take turns, round by round, so that a slow minute slows all of them. What is compared is
the ratio of two cases within a round; what is reported is the median over the rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

__all__ = ["Case", "Timing", "interleave"]

# Worker threads of the case before may still spin; let them fall asleep.
_PAUSE = 0.02


@dataclass(frozen=True)
class Case:
    """Something to measure.

    Args:
        name: its row in the table.
        run: what is timed.
        rounds: in how many of the rounds it takes part, spread evenly; None for all.
        repeats: how often it runs for one measurement, for what takes microseconds.
        prepare: runs before each measurement, off the clock.
        warm_up: runs once at the start instead of `run`, for what takes a minute.
        own_clock: `run` returns the seconds itself.
    """

    name: str
    run: Callable[[], object]
    rounds: int | None = None
    repeats: int = 1
    prepare: Callable[[], object] | None = None
    warm_up: Callable[[], object] | None = None
    own_clock: bool = False


@dataclass(frozen=True)
class Timing:
    """Seconds by round."""

    seconds: dict[int, float]

    @property
    def median(self) -> float:
        """The middle one of the rounds."""
        return median(self.seconds.values())

    def times(self, factor: float) -> Timing:
        """The timing of `factor` times as much work."""
        return Timing({at: factor * value for at, value in self.seconds.items()})

    def speed_beside(self, other: Timing) -> float:
        """How fast this is as a share of the other: the median ratio over common rounds."""
        both = self.seconds.keys() & other.seconds.keys()
        return median(other.seconds[at] / self.seconds[at] for at in both)


def interleave(cases: Sequence[Case], rounds: int) -> dict[str, Timing]:
    """Measure all cases in turns.

    Args:
        cases: with names that differ.
        rounds: how many turns; the order is reversed every other turn.

    Returns:
        Each case's timing by its name.
    """
    for case in cases:
        if case.prepare:
            case.prepare()
        (case.warm_up or case.run)()
    seconds: dict[str, dict[int, float]] = {case.name: {} for case in cases}
    for at in range(rounds):
        for case in cases if at % 2 == 0 else reversed(cases):
            if _takes_part(case, at, rounds):
                time.sleep(_PAUSE)
                seconds[case.name][at] = _measure(case)
    return {name: Timing(by_round) for name, by_round in seconds.items()}


def _takes_part(case: Case, at: int, rounds: int) -> bool:
    wanted = rounds if case.rounds is None else min(case.rounds, rounds)
    # Round 0 first, then as far apart as they go.
    return at in {i * rounds // wanted for i in range(wanted)}


def _measure(case: Case) -> float:
    if case.prepare:
        case.prepare()
    start = time.perf_counter()
    for _ in range(case.repeats):
        result = case.run()
    took = (time.perf_counter() - start) / case.repeats
    if case.own_clock:
        assert isinstance(result, float)
        return result
    return took
