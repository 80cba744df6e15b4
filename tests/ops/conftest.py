"""Runs tests on every implementation of the operators that this machine has."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from anymamba import ops
from tests.support.instruction_sets import ISAS
from tests.support.operators import natively

TRITON = pytest.param(
    "triton",
    marks=pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="needs Triton: pip install triton"
    ),
)


# Module scope: Hypothesis runs a test's examples inside one set-up.
@pytest.fixture(scope="module", params=["reference", *ISAS, TRITON])
def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The reference, the native core with each instruction set, and the Triton kernels."""
    with _kernels(request.param):
        yield request.param


@pytest.fixture(scope="module", params=["reference", *ISAS])
def each_fast_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same without Triton, whose interpreter is slow, for tests of a hundred examples."""
    with _kernels(request.param):
        yield request.param


@pytest.fixture(scope="module", params=[*ISAS, TRITON])
def each_kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """The native core with each instruction set, and the Triton kernels."""
    with _kernels(request.param):
        yield request.param


@pytest.fixture(scope="module", params=ISAS)
def each_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The native core with each instruction set."""
    with _kernels(request.param):
        yield request.param


@contextmanager
def _kernels(name: str) -> Iterator[None]:
    if name == "reference":
        with ops.backend(name):
            yield
    elif name == "triton":
        from tests.support.triton import with_triton

        with with_triton():
            yield
    else:
        with natively(name):
            yield


@pytest.fixture
def automatic_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is chosen, whatever the environment says that the tests run with."""
    monkeypatch.delenv("ANYMAMBA_BACKEND", raising=False)
