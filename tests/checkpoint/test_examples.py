"""The examples in the docstrings run."""

from __future__ import annotations

import doctest
import pkgutil
from importlib import import_module

import pytest

from anymamba import checkpoint

MODULES = [module.name for module in pkgutil.iter_modules(checkpoint.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    failed, tried = doctest.testmod(import_module(f"anymamba.checkpoint.{name}"))
    assert failed == 0
    assert tried > 0
