"""Acting on a module as soon as it was imported."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

Act = Callable[[ModuleType], object]


class AfterImportFinder(MetaPathFinder):
    """Finds modules as others do, and acts on each as soon as it was imported.

    Args:
        acts: by a module's full name, what to call with it.
    """

    is_drop_in = True

    def __init__(self, acts: Mapping[str, Act]) -> None:
        self._acts = acts

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """How to load one of the modules; None for all others."""
        if fullname not in self._acts:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenActing(spec.loader, self._acts[fullname])
        return spec


class _ThenActing(Loader):
    """Loads a module as another loader does, then acts on it."""

    def __init__(self, loader: Loader, act: Act) -> None:
        self._loader, self._act = loader, act

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """The other loader's module."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, then act."""
        assert module.__spec__ is not None
        # What looks at the module's loader sees its own, resource readers for example.
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._act(module)
