"""Do modules still compute from the same weights as when pointers to these were taken?

A table of pointers is right only while no module, weight, hook or function is replaced. A watch
remembers all of them and compares, natively: Python takes half a millisecond for a model of 24
layers once the weights have filled the caches. What is in a weight may change as it likes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_globals

from anymamba.ops.backends import BACKENDS, backend
from anymamba.ops.fusable import GLOBAL_HOOKS, HOOKS, call_attributes
from anymamba.ops.native import core
from anymamba.ops.tracing import autocast_is_on

# How much of a tensor's Python object, and of PyTorch's two objects behind it, tells its address.
_OBJECT_BYTES, _TENSOR_BYTES, _STORAGE_BYTES = 48, 192, 128
# Not the strides themselves, which take three times as long to compare, before each token.
_LAYOUT: tuple[Callable[[Tensor], object], ...] = (Tensor.data_ptr, Tensor.is_contiguous)


class ModuleWatch:
    """Whether modules, their hooks and where and how their weights lie are what they were.

    Args:
        tree: a module, below which no module may be replaced.
        modules: those whose weights are read and whose forward is not called.
        settings: attributes of these modules that decide their result, where they have them.
        device_type: where they compute, for autocast is a device's own.

    Example:
        >>> linear = nn.Linear(2, 2)
        >>> watch = ModuleWatch(linear, [linear], ("in_features",))
        >>> before = watch.holds()
        >>> _ = linear.double()
        >>> before, watch.holds()
        (True, False)
    """

    def __init__(
        self,
        tree: nn.Module,
        modules: Sequence[nn.Module],
        settings: Collection[str],
        device_type: str = "cpu",
    ) -> None:
        native = BACKENDS["cpu"].missing() is None
        self._watch = core().Watch() if native else _PythonWatch()
        self._device = torch.device(device_type)
        # A module's own dicts: looking into them notices replaced modules, weights and hooks.
        for module in tree.modules():
            self._watch.contents(module._modules)
        for module in modules:
            self._watch_module(module, settings)
        for kind in {type(module) for module in modules}:
            for owner, name in call_attributes(kind):
                self._watch.attribute(owner, name)
        for hooks in GLOBAL_HOOKS:
            self._watch.contents(getattr(module_globals, hooks))
        own = [(*m._parameters.values(), *m._buffers.values()) for m in modules]
        self._weights = [weight for weights in own for weight in weights if weight is not None]
        for weight in self._weights:
            self._fetch(weight)
        self._choice = backend()
        self._layouts = self._layouts_now()

    def attribute(self, owner: object, name: str) -> None:
        """Watch one more attribute, such as a function of a Python module."""
        self._watch.attribute(owner, name)

    def holds(self) -> bool:
        """Whether all is as it was, the chosen backend included, and autocast is off."""
        return (
            self._watch.holds()
            and self._layouts_now() == self._layouts
            and backend() == self._choice
            and not autocast_is_on(self._device)
        )

    def _watch_module(self, module: nn.Module, settings: Collection[str]) -> None:
        self._watch.type_of(module)
        for contents in ("_parameters", "_buffers", *HOOKS):
            self._watch.contents(getattr(module, contents))
        own = module.__dict__
        for key in ("forward", *(setting for setting in settings if setting in own)):
            self._watch.entry(own, key)

    def _fetch(self, weight: Tensor) -> None:
        """Let the watch fetch what `data_ptr` reads, for a step drives it out of the caches."""
        for address, size in (
            (id(weight), _OBJECT_BYTES),
            (weight._cdata, _TENSOR_BYTES),
            (weight.untyped_storage()._cdata, _STORAGE_BYTES),
        ):
            self._watch.fetches(address, size)

    def _layouts_now(self) -> tuple[list[object], ...]:
        """Where and how the numbers lie: `weight.data = weight.data.t()` keeps the address.

        By `map`, for a loop would take half as long again, before each token.
        """
        return tuple(list(map(fact, self._weights)) for fact in _LAYOUT)


class _PythonWatch:
    """The core's `Watch` in Python, for a GPU's machine where the core is not built."""

    def __init__(self) -> None:
        self._contents: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._entries: list[tuple[dict[Any, Any], str, object]] = []
        self._attributes: list[tuple[object, str, object]] = []
        self._types: list[tuple[object, type]] = []

    def contents(self, own: dict[Any, Any]) -> None:
        self._contents.append((own, dict(own)))

    def entry(self, own: dict[Any, Any], key: str) -> None:
        self._entries.append((own, key, own.get(key, _ABSENT)))

    def attribute(self, owner: object, name: str) -> None:
        self._attributes.append((owner, name, getattr(owner, name, _ABSENT)))

    def type_of(self, owner: object) -> None:
        self._types.append((owner, type(owner)))

    def fetches(self, address: int, size: int) -> None:
        """A hint to a processor, for which Python has no words."""

    def holds(self) -> bool:
        return (
            all(
                own.keys() == before.keys() and all(own[key] is before[key] for key in before)
                for own, before in self._contents
            )
            and all(own.get(key, _ABSENT) is value for own, key, value in self._entries)
            and all(
                getattr(owner, name, _ABSENT) is value for owner, name, value in self._attributes
            )
            and all(type(owner) is kind for owner, kind in self._types)
        )


_ABSENT = object()
