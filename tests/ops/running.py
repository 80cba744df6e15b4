"""Runs code on the native core in a given way."""

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
        _core.use_isa(isa)
        yield
        _core.use_isa(before)
