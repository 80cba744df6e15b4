"""Runs tests on every implementation of the operators that this machine has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from anymamba import _core, ops

# More than one, so that work is shared out; odd, so that it does not share out evenly.
THREADS = "3"


@contextmanager
def natively(isa: str) -> Iterator[None]:
    """Everything inside runs on the native core, with the kernels of one instruction set."""
    before = _core.isa()
    with pytest.MonkeyPatch.context() as patch, ops.backend("cpu"):
        patch.setenv("ANYMAMBA_NUM_THREADS", THREADS)
        # Kernels that this processor does not need are tested all the same.
        patch.setattr("anymamba.ops.native._MULTIPLIES_BFLOAT16", False)
        _core.use_isa(isa)
        yield
        _core.use_isa(before)


# Module scope: Hypothesis runs a test's examples inside one set-up.
@pytest.fixture(scope="module", params=["reference", *_core.isas()])
def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The reference, and the native core with each instruction set."""
    if request.param == "reference":
        with ops.backend("reference"):
            yield request.param
    else:
        with natively(request.param):
            yield request.param


@pytest.fixture(scope="module", params=_core.isas())
def each_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The native core with each instruction set."""
    with natively(request.param):
        yield request.param
