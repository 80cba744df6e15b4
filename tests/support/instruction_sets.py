"""The instruction sets that a test runs on; PyTorch is not imported here."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from anymamba import _core

# This machine's instruction sets, the first choice first; `make test-fast` takes that one alone.
ISAS = [
    isa if isa == _core.isas()[0] else pytest.param(isa, marks=pytest.mark.native_isa)
    for isa in _core.isas()
]


@contextmanager
def kernels_of(isa: str) -> Iterator[None]:
    """What the native core computes inside is computed with one instruction set."""
    before = _core.isa()
    _core.use_isa(isa)
    try:
        yield
    finally:
        _core.use_isa(before)
