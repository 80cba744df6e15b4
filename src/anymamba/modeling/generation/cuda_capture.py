"""Recording a decode step as a CUDA graph, such that a failure leaves the process as it was.

What a graph cannot record, such as waiting for a number, fails in the middle of a capture, and then
PyTorch goes on as though it still captured: in its allocator, and in its random numbers. So a step
that waits is refused before, and after any other failure PyTorch is brought out of the capture.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WARM_UPS = 3
# Operators after which the host has a number of the device's.
_READS = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "equal"})
_COPIES = frozenset({"_to_copy", "copy_"})
_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def cuda_capture(
    step: Callable[[], Tensor], device: torch.device
) -> tuple[Callable[[], object], Tensor]:
    """Record the kernels that a step launches on an NVIDIA or AMD GPU; one at a time in a process.

    Args:
        step: reads and writes the same memory whenever it is called, and waits for no result.
        device: where.

    Returns:
        A function that launches all of it again, and the tensor that holds the result after that.

    Raises:
        RuntimeError: the step does what cannot be recorded.
    """
    # The current stream once more: PyTorch does not go back to it where a capture fails.
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
        stream = _stream_of(device)
        # Kernels are compiled and libraries take their memory at first use, apart from the graph.
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS - 1):
                step()
            with RefusesWaits(device.type):
                step()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        cause: BaseException | None = None
        try:
            with _recording(graph, stream, pool):
                try:
                    result = step()
                except BaseException as error:
                    cause = error
                    raise
        except BaseException as error:
            _end_capture(device, stream, pool)
            # Where the step failed, ending the capture fails as well, and does not say why.
            raise cause or error from None
    return graph.replay, result


def cuda_mark(device: torch.device) -> Callable[[], object]:
    """Note what was launched so far; the function lets what is launched later wait for it."""
    event = torch.cuda.current_stream(device).record_event()
    return lambda: torch.cuda.current_stream(device).wait_event(event)


class RefusesWaits(TorchDispatchMode):
    """While it lasts, this thread's operators that wait for a device raise a RuntimeError.

    PyTorch's `set_sync_debug_mode` would raise in all other threads too.

    Args:
        device_type: of the tensors that nothing may wait for.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self._device_type = device_type

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        name = func.overloadpacket.__name__
        found = {leaf.device.type for leaf in tree_leaves((args, given)) if _is_tensor(leaf)}
        if name in _READS and self._device_type in found:
            raise RuntimeError(f"a step waits for a result of {name}")
        result = func(*args, **given)
        if name in _COPIES and not _is_asynchronous(args, given):
            found.add(result.device.type)
            if self._device_type in found and len(found) > 1:
                raise RuntimeError(f"a step waits for a copy between {' and '.join(sorted(found))}")
        return result


def _is_tensor(leaf: object) -> bool:
    return isinstance(leaf, Tensor)


def _is_asynchronous(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("non_blocking") or args[2:3] == (True,))


def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """The stream that all captures of a device share: each stream keeps memory of cuBLAS's."""
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)
    return _STREAMS[device]


def _recording(
    graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any
) -> AbstractContextManager[None]:
    # Without a stream PyTorch takes one of the first device that ever captured, and records
    # nothing of another. Other threads may allocate meanwhile.
    return torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")


def _end_capture(device: torch.device, stream: torch.cuda.Stream, pool: Any) -> None:
    """Do what a failed capture left out: memory is allocated, and random numbers drawn, as before.

    PyTorch has no public function for the first, and no function at all for the second; a capture
    that ends well resets the random numbers.
    """
    end = getattr(torch._C, "_cuda_endAllocateToPool", None)
    if end is not None:
        # It raises where the capture itself has ended, and then the graph releases its memory.
        with suppress(RuntimeError):
            end(device.index, pool)
            torch._C._cuda_releasePool(device.index, pool)
    with _recording(torch.cuda.CUDAGraph(), stream, torch.cuda.graph_pool_handle()):
        torch.zeros(1, device=device)
