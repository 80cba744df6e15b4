"""Lets Transformers' Mamba mixers take their decode steps in one native call, once imported.

No function that Transformers looks up covers a whole step, so the forward of the mixer's class is
replaced: openly, as docs/drop-in.md says, and undone by `uninstall`. Nothing is imported here.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MIXERS = {
    "transformers.models.mamba.modeling_mamba": "MambaMixer",
    "transformers.models.falcon_mamba.modeling_falcon_mamba": "FalconMambaMixer",
    "transformers.models.jamba.modeling_jamba": "JambaMambaMixer",
}
"""The module of a model, and its mixer's class."""


STEPS = "anymamba.dropin.mixer_steps"


class MixersFinder(MetaPathFinder):
    """Finds the modules of `MIXERS` as others do, and replaces the forward of their mixers."""

    is_drop_in = True

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """How to load one of the modules; None for all others."""
        if fullname not in MIXERS:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = ThenReplaced(spec.loader)
        return spec


class ThenReplaced(Loader):
    """Loads a model's module as another loader does, then replaces its mixer's forward."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """The other loader's module."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, which then has its loader back."""
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        importlib.import_module(STEPS).replace(module, getattr(module, MIXERS[module.__name__]))


def take_again() -> None:
    """Replace again what was given back."""
    if STEPS in sys.modules:
        sys.modules[STEPS].take_again()


def give_back() -> None:
    """Give all mixers the forward back that they had."""
    if STEPS in sys.modules:
        sys.modules[STEPS].give_back()
