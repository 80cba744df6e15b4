"""How fast a model reads and writes here, beside how fast this machine could."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anymamba.runtime.engine import Engine

# Memory that no cache holds.
BANDWIDTH_BYTES = 1 << 28


@dataclass(frozen=True)
class Speed:
    """What one kind of weights reached with so many threads.

    Args:
        weights: the kind of weights.
        threads: how many threads computed.
        weight_bytes: what the weights take, all of which each new token reads.
        prefill_tokens_per_second: reading a prompt.
        decode_tokens_per_second: writing tokens one by one.
        limit_tokens_per_second: writing, if nothing took time but reading the weights.
    """

    weights: str
    threads: int
    weight_bytes: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    limit_tokens_per_second: float

    @property
    def share_of_limit(self) -> float:
        """How near decoding comes to the limit."""
        return self.decode_tokens_per_second / self.limit_tokens_per_second

    def as_json(self) -> dict[str, Any]:
        """All figures."""
        return asdict(self) | {"share_of_limit": self.share_of_limit}


def measure(
    engine: Engine, threads: int, *, prompt_tokens: int, new_tokens: int, repeats: int
) -> Speed:
    """Measure an engine that is set to so many threads: the median of the repeats counts.

    The model reads and writes tokens of no meaning: what it says takes no part in how long it
    takes. The limit is measured between the repeats, as the speed of memory drifts on machines
    that others use too.
    """
    from anymamba.runtime.native import core

    vocabulary = int(engine.config["vocab_size"])
    prompt = [(7919 * i) % vocabulary for i in range(prompt_tokens)]
    size = max(engine.weight_bytes, 1)
    engine.end_ids = ()  # one of them would end the writing early
    read_seconds, write_seconds, bandwidths = [], [], []
    for _ in range(repeats):
        read_seconds.append(seconds_of(lambda: engine.prefill(engine.state(), prompt)))
        write_seconds.append(seconds_of(lambda: write(engine, prompt[:1], new_tokens)))
        # A model that fits the processor's cache is read from there.
        bandwidths.append(core().read_bandwidth(min(size, BANDWIDTH_BYTES), 3))
    return Speed(
        weights=engine.weight_type,
        threads=threads,
        weight_bytes=size,
        prefill_tokens_per_second=prompt_tokens / statistics.median(read_seconds),
        decode_tokens_per_second=new_tokens / statistics.median(write_seconds),
        limit_tokens_per_second=statistics.median(bandwidths) / size,
    )


def write(engine: Engine, prompt: list[int], count: int) -> None:
    """Write so many tokens."""
    for _ in engine.stream(prompt, max_new_tokens=count, temperature=0):
        pass


def seconds_of(work: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
