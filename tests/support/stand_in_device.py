"""A device that is not there: CPU tensors that say they lie on a GPU.

What PyTorch would refuse on a GPU is refused (tensors of two devices in one operator, NumPy on what
lies there), and every copy between the devices and every number that the host waits for is noted.
Numbers are real, so that code takes the ways that it takes on a GPU, except for kernels.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# Backward asks PyTorch for streams of "cuda", which it was built without, and not of "xla".
TYPES = ("cuda", "xla")
# Which PyTorch asks about a device when a tensor is moved there.
_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
using Cuda = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;
using Xla = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::XLA>;
C10_REGISTER_GUARD_IMPL(CUDA, Cuda)
C10_REGISTER_GUARD_IMPL(XLA, Xla)
}  // namespace
"""
# What PyTorch takes from the CPU beside tensors of a GPU, and copies by itself.
_MIXES = {"copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_"}
_READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount"}


class StandIn(Tensor):
    """A tensor on the device that is not there."""

    inner: Tensor
    place: torch.device
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, place: torch.device) -> StandIn:
        return Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=place,
        )

    def __init__(self, inner: Tensor, place: torch.device) -> None:
        self.inner, self.place = inner, place

    def __repr__(self) -> str:  # type: ignore[override]
        return f"StandIn({self.inner})"

    # What PyTorch has for no tensor of this kind.

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class OnDevice(TorchDispatchMode):
    """While it lasts, tensors can be made on the device. Notes what the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        """Copies to the host, and numbers that it reads."""
        self.uploads: list[str] = []
        """Copies to the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, self)


def run(func: Any, args: Any, kwargs: Any, notes: OnDevice | None = None) -> Any:
    """One operator, on the CPU."""
    name = {"to": "_to_copy"}.get(func.overloadpacket.__name__, func.overloadpacket.__name__)
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [t for t in given if isinstance(t, StandIn)]
    devices = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.device)]
    asked = devices[0] if devices else None
    is_ours = func.namespace == "anymamba"
    for tensor in given:
        # Numbers may come from the CPU, and our operators take tables of segments from there.
        known = isinstance(tensor, StandIn) or tensor.ndim == 0
        table = is_ours and not tensor.is_floating_point()
        if there and not known and not table and name not in _MIXES:
            raise RuntimeError(f"tensors on two devices: {func} got {there[0].place} and cpu")
    if len({t.place for t in there}) > 1 and name not in _MIXES:
        raise RuntimeError(f"tensors on two devices: {func} got {[t.place for t in there]}")
    if notes is not None:
        _note(notes, name, given, there, asked)
    unwrapped, options = tree_map(_inner, (args, kwargs))
    found = func(*unwrapped, **options)
    if func._schema.is_mutable and "out" not in kwargs and isinstance(found, Tensor):
        return args[0]
    if "out" in kwargs:
        return kwargs["out"]
    if asked is None:
        place = there[0].place if there else None
    else:
        place = torch.device(asked.type, 0) if asked.type in TYPES else None
    if place is None:
        return found
    with torch.inference_mode(False):  # a view of a tensor from outside must not be one of inside
        return tree_map(lambda t: StandIn(t, place) if type(t) is Tensor else t, found)


def _note(
    notes: OnDevice, name: str, given: list[Tensor], there: list[Any], asked: torch.device | None
) -> None:
    if there and name in _READS:
        notes.waits.append(name)
    if there and name == "_to_copy" and asked is not None and asked.type == "cpu":
        notes.waits.append("to cpu")
    if name == "_to_copy" and not there and asked is not None and asked.type in TYPES:
        notes.uploads.append("to device")
    if there and name in _MIXES and len(there) < len(given):
        (notes.uploads if isinstance(given[0], StandIn) else notes.waits).append(name)


def _inner(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type in TYPES else value
    return value.inner if isinstance(value, StandIn) else value


@cache
def _register_guards() -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ (Debian: apt-get install g++)")
    torch_folder = Path(torch.__file__).parent
    folder = Path(tempfile.mkdtemp())
    (folder / "guard.cpp").write_text(_GUARD)
    subprocess.run(
        [
            *(compiler, "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder / 'include'}"),
            *(
                "-o",
                folder / "guard.so",
                folder / "guard.cpp",
                f"-L{torch_folder / 'lib'}",
                "-lc10",
            ),
        ],
        check=True,
    )
    ctypes.CDLL(str(folder / "guard.so"))
    shutil.rmtree(folder)


def _moving_modules() -> Any:
    """`nn.Module._apply` with new parameters: PyTorch would make old ones point to the device."""
    moved: dict[int, tuple[Tensor, Tensor]] = {}

    def follow(tensor: Tensor, fn: Any) -> Tensor:
        new = fn(tensor.detach())
        if type(new) is type(tensor.data) is Tensor:
            tensor.data = new
            return tensor
        if id(tensor) not in moved:  # tied weights stay one
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, tensor.requires_grad)
            moved[id(tensor)] = (tensor, new)
        return moved[id(tensor)][1]

    def apply(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
        for child in self.children() if recurse else ():
            child._apply(fn)
        for tensors in (self._parameters, self._buffers):
            for key, tensor in tensors.items():
                if tensor is not None:
                    tensors[key] = follow(tensor, fn)  # type: ignore[assignment]
        return self

    return apply


@contextmanager
def stand_in_device() -> Iterator[OnDevice]:
    """As on a machine with one GPU, for as long as it lasts."""
    from anymamba.modeling.generation import graph
    from anymamba.ops import direct, fusable, tracing
    from anymamba.ops.backends import INSTALLED

    if torch.backends.cuda.is_built():
        pytest.skip("needs a build of PyTorch for the CPU alone")
    _register_guards()
    with ExitStack() as stack:
        for module in (tracing, fusable, direct, graph):
            plain = (*module.PLAIN_TYPES, StandIn)
            stack.enter_context(patch.object(module, "PLAIN_TYPES", plain))
        for name, value in {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "device": lambda _device: nullcontext(),
        }.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(patch.object(nn.Module, "_apply", _moving_modules()))
        stack.enter_context(patch.object(torch, "xla", torch.cpu, create=True))
        # `torch.tensor` makes its tensor on the CPU, and then moves it in sight of the mode.
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        # Kernels need the memory of the device, and a graph the device itself.
        stack.enter_context(patch.dict(INSTALLED, {"triton": False, "mamba_ssm": False}))
        for needs_device in (graph.CAPTURES, graph.MARKS):
            stack.enter_context(patch.dict(needs_device, clear=True))
        yield stack.enter_context(OnDevice())
