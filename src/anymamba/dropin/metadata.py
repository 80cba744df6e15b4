"""Answers `importlib.metadata.version("mamba-ssm")` and the like."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path

from anymamba.upstream import PACKAGES, is_left_alone, is_loading


class DistributionsFinder(DistributionFinder):
    """Finds the distributions `mamba-ssm` and `causal-conv1d`, which no folder holds."""

    is_drop_in = True

    def find_spec(self, *_: object) -> None:
        """Finds no modules; `Finder` does."""
        return

    def find_distributions(
        self,
        context: DistributionFinder.Context = DistributionFinder.Context(),  # noqa: B008
    ) -> Iterable[Distribution]:
        """Those of the two that the context's name asks for, which is None for both."""
        if is_loading():
            return []
        asked = None if context.name is None else normalized(context.name)
        answered = [name for name in PACKAGES if not is_left_alone(name)]
        return [Standing(name) for name in answered if asked in (None, name)]


class Standing(Distribution):
    """The metadata of a package that AnyMamba stands for.

    Args:
        package: the name that programs import.
    """

    def __init__(self, package: str) -> None:
        self._package = package

    def read_text(self, filename: str) -> str | None:
        """The two files that are asked for: what it is, and which package it brings."""
        if filename == "METADATA":
            return (
                f"Metadata-Version: 2.1\nName: {self._package}\n"
                f"Version: {version_of(self._package)}\n"
                "Summary: answered by AnyMamba\n"
            )
        return f"{self._package}\n" if filename == "top_level.txt" else None

    def locate_file(self, path: str | os.PathLike[str]) -> Path:
        """Where a file of the package is."""
        return Path(__file__).parent / path


def version_of(package: str) -> str:
    """The version that a package of ours says it has, read without importing it."""
    source = (Path(__file__).parent / package / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', source, flags=re.MULTILINE)
    assert found is not None
    return found[1]


def normalized(name: str) -> str:
    """A distribution's name as Python's modules are named."""
    return name.lower().replace("-", "_").replace(".", "_")
