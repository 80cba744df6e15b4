"""How a CUDA graph is captured, by the calls that PyTorch gets: no GPU is here."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from anymamba.modeling.generation import cuda_capture as module
from anymamba.modeling.generation.cuda_capture import RefusesWaits, cuda_capture

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


class Stream:
    """Waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait_stream(self, other: object) -> None:
        """There is one order."""


class Graph:
    """Replays nothing."""

    def replay(self) -> None:
        raise AssertionError


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What PyTorch is asked for: captures with their stream and pool, and the end of their pools.

    As PyTorch does, it refuses a second capture while it still is in a first, and ending one fails
    without a word of what failed in it.
    """
    noted: list[tuple[Any, ...]] = []
    underway: list[Any] = []
    zeros = torch.zeros

    @contextmanager
    def capturing(
        graph: Graph, *, pool: Any, stream: Stream, capture_error_mode: str
    ) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        assert not underway, "the allocator is in a capture"
        underway.append(pool)
        noted.append(("capture", stream, pool))
        try:
            yield
        except BaseException as error:
            raise RuntimeError("previous error during capture") from error
        underway.remove(pool)

    def end(index: int, pool: Any) -> None:
        if pool not in underway:
            raise RuntimeError("not currently recording to mempool_id")
        underway.remove(pool)
        noted.append(("end", index, pool))

    def release(index: int, pool: Any) -> None:
        noted.append(("release", index, pool))

    pools = iter(range(99))
    monkeypatch.setattr(module, "_STREAMS", {})
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(device))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", release, raising=False)
    monkeypatch.setattr(torch, "zeros", lambda *sizes, device: zeros(*sizes))
    return noted


def test_a_device_has_one_stream_for_all_captures(calls: list[tuple[Any, ...]]) -> None:
    for device in (FIRST, SECOND, FIRST):
        cuda_capture(lambda: torch.ones(1), device)
    streams = [call[1] for call in calls]
    assert [stream.device for stream in streams] == [FIRST, SECOND, FIRST]
    assert streams[0] is streams[2]
    assert len({call[2] for call in calls}) == 3, "graphs share no memory"


def test_a_failed_capture_is_ended(calls: list[tuple[Any, ...]]) -> None:
    taken = 0

    def step() -> Tensor:
        nonlocal taken
        taken += 1
        if taken == module._WARM_UPS + 1:
            raise RuntimeError("operation not permitted when stream is capturing")
        return torch.ones(1)

    with pytest.raises(RuntimeError, match="operation not permitted when stream is capturing"):
        cuda_capture(step, SECOND)
    (first, stream, pool), *cleaning = calls
    again = ("capture", stream, pool + 1)  # which resets the random numbers
    assert first == "capture"
    assert cleaning == [("end", 1, pool), ("release", 1, pool), again]
    cuda_capture(lambda: torch.ones(1), SECOND)


def test_a_step_that_waits_is_not_captured(
    calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RefusesWaits", lambda device_type: RefusesWaits("cpu"))
    with pytest.raises(RuntimeError, match="a step waits for a result of _local_scalar_dense"):
        cuda_capture(lambda: torch.ones(1) * torch.ones(1).item(), FIRST)
    assert calls == []


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.item(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x.to("meta"),
        lambda x: torch.empty(2, device="meta").copy_(x),
    ],
)
def test_what_waits(call: Callable[[Tensor], object]) -> None:
    x = torch.ones(1)
    with RefusesWaits("cpu"), pytest.raises(RuntimeError, match="a step waits for a"):
        call(x)


def test_what_does_not_wait() -> None:
    x = torch.ones(2)
    with RefusesWaits("cpu"):
        x.to(torch.bfloat16)
        x.copy_(x + 1)
        torch.empty(2, device="meta").copy_(x, non_blocking=True)
        torch.empty(2, device="meta").sum()
    with RefusesWaits("cuda"):
        assert x.sum().item() == 4
