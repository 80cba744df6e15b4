"""Answers `import mamba_ssm`, `import causal_conv1d` and their extensions with this folder."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from anymamba.dropin.dispatch import OURS, answering
from anymamba.dropin.forks import OWN_PACKAGE, fork_of
from anymamba.errors import MissingModuleError
from anymamba.upstream import NAMES, import_original, is_left_alone, is_loading


class Finder(MetaPathFinder):
    """Finds `mamba_ssm.X` as `anymamba.dropin.mamba_ssm.X`: one module under two names.

    A module that is not there comes from the original package where that answers, too. Names that
    a module of ours lacks are refused as modules that a package lacks.
    """

    is_drop_in = True

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """How to load a module of the packages and extensions; None for all others.

        Raises:
            MissingModuleError: neither the drop-in nor an original that answers has the module.
        """
        name = fullname.removeprefix(OURS)
        package = name.partition(".")[0]
        if package not in NAMES or is_loading():
            return None
        if is_left_alone(package) and fullname == name:
            return None
        ours = find_ours(name)
        if fullname != name:
            # `from mamba_ssm import X` asks for this name where the package has no X.
            return ours or refuse(name)
        if ours is not None:
            places = ours.submodule_search_locations
            spec = ModuleSpec(name, Alias(), origin=ours.origin, is_package=places is not None)
            spec.submodule_search_locations = places
            spec.has_location = True
            return spec
        return ModuleSpec(name, Original()) if package in answering else refuse(name)


def find_ours(name: str) -> ModuleSpec | None:
    """Our module of a name, looked for in its folder; nothing is imported."""
    folder = Path(__file__).parent.joinpath(*name.split(".")[:-1])
    return PathFinder.find_spec(OURS + name, [str(folder)])


def refuse(name: str) -> ModuleSpec:
    """Say that the drop-in lacks a module."""
    fork = fork_of(name.rpartition(".")[2])
    origin = "" if fork is None else f" It is {fork}'s: {OWN_PACKAGE}."
    raise MissingModuleError(
        f"{name} is not in AnyMamba's drop-in, which stands for its package here: "
        f"docs/drop-in.md lists what is.{origin}",
        name=name,
    )


class Alias(Loader):
    """Gives a module of ours a second name."""

    def exec_module(self, module: ModuleType) -> None:
        """Put our module in the place of the empty one that was made."""
        ours = importlib.import_module(OURS + module.__name__)
        # With a path, though an empty one, Python asks the finder for the names that it lacks.
        vars(ours).setdefault("__path__", [])
        sys.modules[module.__name__] = ours


class Original(Loader):
    """Gives a module of the original package, which is kept apart, its name back."""

    def exec_module(self, module: ModuleType) -> None:
        """Put the original's module in the place of the empty one that was made."""
        # The right side comes first: while the original loads, this name is its own.
        sys.modules[module.__name__] = import_original(module.__name__)
