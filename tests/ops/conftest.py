"""Runs tests on every implementation of the operators that this machine has."""

from collections.abc import Iterator

import pytest

from anymamba import ops
from tests.support.instruction_sets import ISAS
from tests.support.operators import natively


# Module scope: Hypothesis runs a test's examples inside one set-up.
@pytest.fixture(scope="module", params=["reference", *ISAS])
def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The reference, and the native core with each instruction set."""
    if request.param == "reference":
        with ops.backend("reference"):
            yield request.param
    else:
        with natively(request.param):
            yield request.param


@pytest.fixture(scope="module", params=ISAS)
def each_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The native core with each instruction set."""
    with natively(request.param):
        yield request.param
