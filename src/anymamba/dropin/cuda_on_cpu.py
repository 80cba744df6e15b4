"""Programs that name "cuda" in their text, on machines without it: they get the CPU.

A mode of PyTorch sees each call of an operator and changes its devices; `cuda_functions` answers
what programs ask of `torch.cuda` itself.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from anymamba.dropin.cuda_functions import Replacements, replacements

_OLD_TYPES = "torch.cuda."


class CudaOnCpu(TorchFunctionMode):
    """Within this context, what goes to a CUDA device goes to the CPU, in every thread.

    PyTorch's modes belong to threads: each thread that starts within this context enters it too.
    Memory that a program pins stays as it is.

    Args:
        tell: called once, with a line that says so, when it first happens.

    Example:
        >>> with CudaOnCpu(print):
        ...     x = torch.zeros(2, device="cuda") + torch.ones(2).cuda()
        no CUDA here: what this program puts there is on the CPU
        >>> x.device
        device(type='cpu')
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self._tell: Callable[[str], None] | None = tell
        self._replaced: Replacements = []

    def __enter__(self) -> CudaOnCpu:
        super().__enter__()
        wanted = [
            *replacements(),
            (torch, "load", loading_to_the_cpu(torch.load)),
            (torch, "set_default_device", on_the_cpu(torch.set_default_device)),
            (torch.nn.Module, "to", on_the_cpu(torch.nn.Module.to)),
            (threading.Thread, "start", self._starting(threading.Thread.start)),
        ]
        self._replaced = [(owner, name, getattr(owner, name)) for owner, name, _ in wanted]
        for owner, name, value in wanted:
            setattr(owner, name, value)
        return self

    def __exit__(self, *caught: Any) -> None:
        for owner, name, value in reversed(self._replaced):
            setattr(owner, name, value)
        super().__exit__(*caught)

    def _starting(self, start: Callable[[threading.Thread], None]) -> Callable[..., None]:
        """`Thread.start`, for threads that run their function within this mode."""

        @functools.wraps(start)
        def start_in_mode(thread: threading.Thread) -> None:
            run = thread.run

            def run_in_mode() -> None:
                del thread.run
                super(CudaOnCpu, self).__enter__()
                # Left before the thread ends: a mode that outlives it is freed too late.
                try:
                    run()
                finally:
                    super(CudaOnCpu, self).__exit__(None, None, None)

            thread.run = run_in_mode  # type: ignore[method-assign]
            start(thread)

        return start_in_mode

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a function of PyTorch with other devices."""
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            self._say_so()
            return args[0]
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.to:
            args = (args[0], *map(named, args[1:2]), *args[2:])
        if "device" in kwargs:
            kwargs = {**kwargs, "device": named(kwargs["device"])}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if any(map(names_cuda, args)) or any(map(names_cuda, kwargs.values())):
            self._say_so()
            args = tuple(map(without_cuda, args))
            kwargs = {name: without_cuda(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _say_so(self) -> None:
        if self._tell is not None:
            self._tell("no CUDA here: what this program puts there is on the CPU")
            self._tell = None


def named(device: Any) -> Any:
    """A device that is given by its number alone, as `torch.device` takes it."""
    return f"cuda:{device}" if type(device) is int else device


def names_cuda(value: object) -> bool:
    """Whether an argument is a CUDA device, or the name of one or of a type of its tensors."""
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and (
        value.partition(":")[0] == "cuda" or value.startswith(_OLD_TYPES)
    )


def without_cuda(value: Any) -> Any:
    """The CPU for a CUDA device, and its types of tensors for those of CUDA; else the value."""
    if not names_cuda(value):
        return value
    if isinstance(value, str) and value.startswith(_OLD_TYPES):
        return f"torch.{value.removeprefix(_OLD_TYPES)}"
    return "cpu"


def on_the_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of devices that PyTorch's modes do not see."""

    @functools.wraps(function)
    def with_other_devices(*args: Any, **kwargs: Any) -> Any:
        kwargs = {name: without_cuda(named(value)) for name, value in kwargs.items()}
        return function(*(without_cuda(named(value)) for value in args), **kwargs)

    return with_other_devices


def loading_to_the_cpu(load: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.load` for files whose tensors were, or are to be, on CUDA."""

    @functools.wraps(load)
    def load_to_the_cpu(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        if map_location is None or names_cuda(map_location) or isinstance(map_location, dict | int):
            map_location = "cpu"
        return load(f, map_location, *args, **kwargs)

    return load_to_the_cpu
