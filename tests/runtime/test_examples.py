"""The examples in the docstrings run."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest

# Modules that have examples of their own public names.
MODULES = [
    "bfloat16",
    "calibration",
    "chat_rendering",
    "chat_template",
    "convert",
    "engine",
    "generation",
    "identity",
    "kinds",
    "loading",
    "mapping",
    "native",
    "processors",
    "quantization",
    "quantize_checkpoint",
    "sampling",
    "sampling_settings",
    "scoring",
    "state",
    "streaming",
    "tokenizer",
    "weights",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    module = import_module(f"anymamba.runtime.{name}")
    failed, tried = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert failed == 0
    assert tried > 0
