"""What the server has done, as Prometheus reads it: `/metrics`, with vLLM's names where it has any.

Each token costs an addition or two: what is counted are plain numbers, which become Prometheus'
text when somebody asks.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from anymamba.runtime.generation import TokenOutput
from anymamba.runtime.serving import Event, Request, Started

if TYPE_CHECKING:
    from prometheus_client import Metric

_FIRST_TOKEN = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0),
    *(7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_TOKEN = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST = (
    *(0.01, 0.025, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_LENGTH = tuple(float(digit * 10**power) for power in range(7) for digit in (1, 2, 5))
_COUNTERS = {
    "prompt_tokens": "Tokens of prompts, those that the cache had among them.",
    "generation_tokens": "Tokens that were written.",
    "prefix_cache_queries": "Tokens that the cache was asked for.",
    "prefix_cache_hits": "Tokens that the cache had, and that were not read again.",
}
_HISTOGRAMS = {
    "time_to_first_token_seconds": (_FIRST_TOKEN, "From a request to its first token."),
    "inter_token_latency_seconds": (_TOKEN, "Between a token and the next of the same text."),
    "request_time_per_output_token_seconds": (
        _TOKEN,
        "The same, of each request the mean over its tokens.",
    ),
    "e2e_request_latency_seconds": (_REQUEST, "From a request to its last token."),
    "request_queue_time_seconds": (_REQUEST, "How long a request waited for its turn."),
    "request_prompt_tokens": (_LENGTH, "How long prompts are."),
    "request_generation_tokens": (_LENGTH, "How long answers are."),
}
_REASONS = {"eos": "stop", "stop": "stop", "length": "length"}


class _Histogram:
    """How many values lie between bounds."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """Each bound, and how many values are no larger."""
        below, found = 0, []
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            below += count
            found.append(("+Inf" if bound == float("inf") else str(bound), float(below)))
        return found


class _Figures:
    """What is counted of a model. The scheduler's thread counts tokens."""

    def __init__(self) -> None:
        self.counters = Counter(dict.fromkeys(_COUNTERS, 0))
        self.finished = Counter(dict.fromkeys(("stop", "length", "abort", "error"), 0))
        self.histograms = {name: _Histogram(bounds) for name, (bounds, _) in _HISTOGRAMS.items()}
        self.lock = threading.Lock()  # of what ends requests, which any thread may

    def observe(self, name: str, value: float) -> None:
        self.histograms[name].observe(value)


class Followed:
    """A request on its way: `hear` all events of it, and `end` it where it is given up."""

    def __init__(self, figures: _Figures, request: Request) -> None:
        self._figures = figures
        self._prompt_tokens = request.ids.size
        others = (request.state, request.pooling, request.scores)
        self._uses_cache = all(other is None for other in others)
        self._tokens, self._ended = 0, False
        self._submitted = self._first = self._last = time.perf_counter()

    def hear(self, event: Event) -> None:
        """Count an event."""
        figures = self._figures
        if isinstance(event, TokenOutput):
            now = time.perf_counter()
            if self._tokens:
                figures.observe("inter_token_latency_seconds", now - self._last)
            else:
                figures.observe("time_to_first_token_seconds", now - self._submitted)
                self._first = now
            self._tokens, self._last = self._tokens + 1, now
            figures.counters["generation_tokens"] += 1
            if event.finish_reason is not None:
                self.end(_REASONS[event.finish_reason])
        elif isinstance(event, Started):
            self._start(event)
        else:
            self.end("error" if isinstance(event, Exception) else "stop")

    def end(self, reason: str = "abort") -> None:
        """Count that it is over, and why, unless it was before."""
        with self._figures.lock:
            if self._ended:
                return
            self._ended = True
            self._figures.finished[reason] += 1
        if reason in ("stop", "length"):
            now, figures = time.perf_counter(), self._figures
            figures.observe("e2e_request_latency_seconds", now - self._submitted)
            figures.observe("request_generation_tokens", self._tokens)
            if self._tokens > 1:
                mean = (self._last - self._first) / (self._tokens - 1)
                figures.observe("request_time_per_output_token_seconds", mean)

    def _start(self, event: Started) -> None:
        figures, count = self._figures, self._prompt_tokens
        figures.observe("request_queue_time_seconds", time.perf_counter() - self._submitted)
        figures.observe("request_prompt_tokens", count)
        figures.counters["prompt_tokens"] += count
        if self._uses_cache:
            figures.counters["prefix_cache_queries"] += count
            figures.counters["prefix_cache_hits"] += event.cached_tokens


Gauges = Callable[[], Iterable[tuple[str, str, dict[str, float]]]]
"""What there is at the moment: a name, what it says, and its value by model ("" for all)."""


class Metrics:
    """What is counted of each model.

    Args:
        models: their names.
        gauges: tells what is not counted, but looked at.
    """

    def __init__(self, models: Iterable[str], gauges: Gauges) -> None:
        self._figures = {model: _Figures() for model in models}
        self._gauges = gauges

    def follow(self, request: Request) -> Followed:
        """Count what becomes of a request, from now on."""
        return Followed(self._figures[request.model], request)

    def text(self) -> tuple[bytes, str]:
        """What Prometheus reads, and its type.

        Raises:
            ModuleNotFoundError: prometheus_client is not installed.
        """
        from prometheus_client import CollectorRegistry
        from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry), CONTENT_TYPE_LATEST

    def collect(self) -> Iterator[Metric]:
        """The numbers as prometheus_client takes them."""
        from prometheus_client.core import (
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
        )

        labels: Any = ["model_name"]
        for name, says, values in self._gauges():
            gauge = GaugeMetricFamily(name, says, labels=labels if "" not in values else None)
            for model, value in values.items():
                gauge.add_metric([model] if model else [], value)
            yield gauge
        for name, says in _COUNTERS.items():
            counter = CounterMetricFamily(f"vllm:{name}", says, labels=labels)
            for model, figures in self._figures.items():
                counter.add_metric([model], figures.counters[name])
            yield counter
        says = "Requests that are over: stop, length, abort (by the client) or error."
        finished = CounterMetricFamily(
            "vllm:request_success", says, labels=[*labels, "finished_reason"]
        )
        for model, figures in self._figures.items():
            for reason, count in figures.finished.items():
                finished.add_metric([model, reason], count)
        yield finished
        for name, (_, says) in _HISTOGRAMS.items():
            family = HistogramMetricFamily(f"vllm:{name}", says, labels=labels)
            for model, figures in self._figures.items():
                histogram = figures.histograms[name]
                family.add_metric([model], histogram.buckets(), histogram.total)
            yield family
