"""A stand-in for CUDA graphs on the CPU: it records operators and repeats them on the same memory.

Like a graph, a repetition runs no Python of the model's: what a Python number decided stays as it
was, and a tensor that was put in another's place is not seen. Reading a number from a tensor is
refused, as a GPU refuses it while it captures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READS = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal")


class Recording(TorchDispatchMode):
    """While it lasts, every operator is run and noted."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in _READS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        given = kwargs or {}
        found = func(*args, **given)
        memory = {leaf.untyped_storage().data_ptr() for leaf in _tensors((args, given))}
        # Views and what is changed in place follow by themselves.
        new = [t for t in _tensors(found) if t.untyped_storage().data_ptr() not in memory]
        if new or func._schema.is_mutable:
            self.calls.append((func, args, given, new))
        return found

    def repeat(self) -> None:
        """Run all of it again, into the memory of the first time."""
        for func, args, kwargs, new in self.calls:
            found = _tensors(func(*args, **kwargs))
            if new:
                for old, now in zip(new, found[-len(new) :], strict=True):
                    old.copy_(now)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def recorded(
    step: Callable[[], Tensor], device: torch.device
) -> tuple[Callable[[], object], Tensor]:
    """As `anymamba.modeling.generation.graph.cuda_capture`."""
    step()  # what is made at first use
    with Recording() as recording:
        result = step()
    return recording.repeat, result
