"""Programs that name "cuda" get the CPU where there is none, and are told so."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from anymamba.dropin.cuda_on_cpu import CudaOnCpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")


def test_what_goes_to_cuda_is_on_the_cpu(tmp_path: Path) -> None:
    load, synchronize = torch.load, torch.cuda.synchronize
    said: list[str] = []
    with CudaOnCpu(said.append):
        x = torch.arange(3.0)
        assert x.to("cpu", torch.float16).dtype == torch.float16
        assert said == []
        device = torch.device("cuda", 0)
        moved = [
            x.cuda(),
            x.to("cuda"),
            x.to(device, torch.float64),
            x.to(device="cuda:0"),
            x.new_zeros(2, device="cuda"),
            torch.zeros(2, device=device),
            torch.tensor([1.0], device="cuda"),
            torch.ones_like(x, device="cuda"),
        ]
        with torch.device("cuda"):
            moved.append(torch.zeros(2))
        for layer in (
            nn.Linear(3, 2).cuda(),
            nn.Linear(3, 2).to("cuda"),
            nn.Linear(3, 2, device=device),
        ):
            moved += [layer.weight, layer(x.cuda())]
        torch.save(x, tmp_path / "x.pt")
        moved.append(torch.load(tmp_path / "x.pt", map_location="cuda"))
        torch.cuda.synchronize()
        assert {y.device.type for y in moved} == {"cpu"}
        assert moved[2].dtype == torch.float64
        assert torch.equal(moved[0], x)
    assert said == ["no CUDA here: what this program puts there is on the CPU"]
    assert (torch.load, torch.cuda.synchronize) == (load, synchronize)
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2, device="cuda")


def test_other_devices_and_other_words_stay() -> None:
    with CudaOnCpu(pytest.fail):
        assert torch.zeros(2, device="meta").device.type == "meta"
        assert torch.einsum("i,i->", torch.ones(2), torch.ones(2)) == 2


CALLS: dict[str, Callable[[], Any]] = {
    "device numbers": lambda: (
        torch.zeros(2).to(0),
        torch.zeros(2, device=0),
        nn.Linear(2, 2).to(0).weight,
        nn.Linear(2, 2).cuda(0).weight,
    ),
    "the current device": lambda: torch.zeros(1, device=torch.cuda.current_device()),
    "old types": lambda: (
        torch.cuda.FloatTensor(2),
        torch.zeros(2).type(torch.cuda.FloatTensor),
        torch.zeros(2).type("torch.cuda.HalfTensor"),
    ),
    "pinned memory": lambda: (torch.zeros(2).pin_memory(), torch.empty(2, pin_memory=True)),
    "a generator": lambda: torch.randn(
        2, generator=torch.Generator(device="cuda").manual_seed(0), device="cuda"
    ),
    "moves without waiting": lambda: torch.zeros(1).cuda(non_blocking=True),
    "a context of a device": lambda: enter(torch.cuda.device(0), lambda: torch.zeros(1).cuda()),
    "a default device": lambda: with_default_device(lambda: torch.zeros(1)),
    "DataParallel": lambda: nn.DataParallel(nn.Linear(2, 2), [0]).cuda()(torch.zeros(1, 2)),
}


def enter(context: Any, function: Callable[[], Any]) -> Any:
    with context:
        return function()


def with_default_device(function: Callable[[], Any]) -> Any:
    torch.set_default_device("cuda")
    try:
        return function()
    finally:
        torch.set_default_device("cpu")


@pytest.mark.parametrize("name", CALLS)
def test_what_programs_put_on_cuda(name: str) -> None:
    with CudaOnCpu(lambda line: None):
        found = CALLS[name]()
        for tensor in found if isinstance(found, tuple) else (found,):
            assert tensor.device.type == "cpu"


def test_what_programs_ask_of_cuda() -> None:
    def everything() -> list[Any]:
        return [getattr(torch.cuda, name) for name in dir(torch.cuda)]

    before, generator = everything(), torch.Generator
    with CudaOnCpu(pytest.fail):
        torch.cuda.init()
        torch.cuda.set_device(0)
        assert isinstance(torch.cuda.get_device_name(0), str)
        assert torch.cuda.get_device_properties(0).total_memory > 0
        assert torch.cuda.get_device_capability() < (7, 0)
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.empty_cache()
        assert torch.cuda.max_memory_allocated() == 0
        free, total = torch.cuda.mem_get_info()
        assert 0 < free <= total
        assert isinstance(torch.cuda.memory_summary(), str)
        torch.cuda.manual_seed_all(0)
        torch.cuda.set_rng_state(torch.cuda.get_rng_state())
        torch.cuda.is_bf16_supported()
        torch.cuda.nvtx.range_push("here")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            start.record()
            torch.zeros(1).record_stream(stream)
            stop.record()
        stop.synchronize()
        torch.cuda.synchronize(0)
        assert start.elapsed_time(stop) >= 0
        assert isinstance(torch.default_generator, torch.Generator)
        # These two stay true, for programs that look.
        assert not torch.cuda.is_available()
        assert torch.cuda.device_count() == 0
    assert everything() == before
    assert torch.Generator is generator


def test_files_of_cuda_tensors_load_whatever_place_is_named(tmp_path: Path) -> None:
    torch.save(torch.ones(2), tmp_path / "x.pt")
    places = [None, 0, "cuda:1", torch.device("cuda"), {"cuda:0": "cuda:1"}]
    places.append(lambda storage, place: storage.cuda())
    with CudaOnCpu(lambda line: None):
        for place in places:
            assert torch.load(tmp_path / "x.pt", map_location=place).device.type == "cpu"


class Made(threading.Thread):
    """A thread with a `run` of its own."""

    def run(self) -> None:
        self.found = torch.zeros(2, device="cuda")


class OnCuda(Dataset[torch.Tensor]):
    """Its items are on CUDA from the start."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((2,), float(index)).cuda()


@pytest.mark.filterwarnings("ignore")  # of PyTorch, that memory is not pinned
def test_it_holds_in_every_thread_and_forked_process() -> None:
    start = threading.Thread.start
    with CudaOnCpu(lambda line: None):
        with ThreadPoolExecutor(2) as pool:
            assert pool.submit(lambda: torch.ones(2).cuda()).result().device.type == "cpu"
        thread = Made()
        thread.start()
        thread.join()
        assert thread.found.device.type == "cpu"
        workers = DataLoader(
            OnCuda(), num_workers=1, pin_memory=True, multiprocessing_context="fork"
        )
        assert [float(x[0, 0]) for x in workers] == [0.0, 1.0, 2.0]
    assert threading.Thread.start is start
    assert "run" not in vars(thread)
