"""Programs that name "cuda" in their text, on machines without it: they get the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["CudaOnCpu"]


class CudaOnCpu(TorchFunctionMode):
    """Within this context, what goes to a CUDA device goes to the CPU.

    It holds for the thread that enters it. Memory that a program pins stays as it is.

    Args:
        tell: called once, with a line that says so, when it first happens.

    Example:
        >>> import torch
        >>> from anymamba.dropin.cuda_on_cpu import CudaOnCpu
        >>> with CudaOnCpu(print):
        ...     x = torch.zeros(2, device="cuda") + torch.ones(2).cuda()
        no CUDA here: what this program puts there is on the CPU
        >>> x.device
        device(type='cpu')
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self._tell: Callable[[str], None] | None = tell

    def __enter__(self) -> CudaOnCpu:
        super().__enter__()
        self._load, self._synchronize = torch.load, torch.cuda.synchronize
        torch.load = loading_to_the_cpu(torch.load)
        # On the CPU nothing is left to be waited for.
        torch.cuda.synchronize = lambda device=None: None
        return self

    def __exit__(self, *caught: Any) -> None:
        torch.load, torch.cuda.synchronize = self._load, self._synchronize
        super().__exit__(*caught)

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
        if any(map(names_cuda, args)) or any(map(names_cuda, kwargs.values())):
            self._say_so()
            args = tuple("cpu" if names_cuda(value) else value for value in args)
            kwargs = {name: "cpu" if names_cuda(value) else value for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _say_so(self) -> None:
        if self._tell is not None:
            self._tell("no CUDA here: what this program puts there is on the CPU")
            self._tell = None


def names_cuda(value: object) -> bool:
    """Whether an argument is a CUDA device, or its name."""
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and value.partition(":")[0] == "cuda"


def loading_to_the_cpu(load: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.load` for files whose tensors were, or are to be, on CUDA."""

    @functools.wraps(load)
    def load_to_the_cpu(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        elsewhere = map_location is None or names_cuda(map_location)
        return load(f, "cpu" if elsewhere else map_location, *args, **kwargs)

    return load_to_the_cpu
