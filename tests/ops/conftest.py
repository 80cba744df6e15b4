"""Runs tests on every implementation of the operators that this machine has."""

from collections.abc import Iterator

import pytest

from anymamba import ops
from tests.support.instruction_sets import ISAS
from tests.support.operators import natively
from tests.support.triton import with_triton


# Module scope: Hypothesis runs a test's examples inside one set-up.
@pytest.fixture(scope="module", params=["reference", "triton", *ISAS])
def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The reference, the Triton kernels, and the native core with each instruction set."""
    if request.param == "reference":
        with ops.backend("reference"):
            yield request.param
    elif request.param == "triton":
        with with_triton():
            yield request.param
    else:
        with natively(request.param):
            yield request.param


@pytest.fixture(scope="module", params=ISAS)
def each_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The native core with each instruction set."""
    with natively(request.param):
        yield request.param
