"""A lack of memory is a MemoryError, whoever runs into it, and leaves everything as it was."""

from __future__ import annotations

import sys

import pytest

from tests.support.processes import assert_ends_well, run_python

pytestmark = pytest.mark.slow

# Their kernels take memory of their own; the others' work needs none.
TAKE_MEMORY = {"conv", "conv_backward", "norm_backward", "product", "quantized_product"} | {
    "scan",
    "scan_backward",
}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the address space so")
@pytest.mark.parametrize("who", ["operators", "engine"])
def test_a_lack_of_memory_is_told_and_changes_nothing(who: str) -> None:
    # One heap for all threads, which can be filled.
    printed = assert_ends_well(
        run_python("-m", "tests.native.scarce", who, MALLOC_ARENA_MAX="1", timeout=300)
    )
    told = {name: int(count) for name, count in (line.split(": ") for line in printed.splitlines())}
    must = TAKE_MEMORY if who == "operators" else told.keys()
    assert len(told) >= 11
    assert {name for name in must if told[name] == 0} == set()
