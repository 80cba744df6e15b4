"""Triton's kernels where there is no GPU: interpreted in bearable time, or only compiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from anymamba import ops
from anymamba.ops.triton import is_interpreted


@contextmanager
def with_triton() -> Iterator[None]:
    """The Triton kernels for all operators that have one: interpreted, or on a GPU.

    Skips where Triton is not installed, for it is made for Linux alone.
    """
    pytest.importorskip("triton", reason="needs Triton: pip install triton")
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch, ops.backend("triton"):
        if is_interpreted():
            patch.setattr(interpreter.ScanOps, "generic_scan", scan_by_slices)
            patch.setattr(interpreter.InterpretedFunction, "__call__", call_in_kernel(interpreter))
        yield


def call_in_kernel(interpreter: Any) -> Any:
    """A kernel's call of a function of ours, without patching `triton.language` once more.

    The interpreter does so at each call, which takes most of its time.
    """
    call = interpreter.InterpretedFunction.__call__

    def faster(self: Any, *args: Any, **kwargs: Any) -> Any:
        ours = self.fn.__module__.startswith("anymamba.")
        return self.rewrite()(*args, **kwargs) if ours else call(self, *args, **kwargs)

    return faster


def scan_by_slices(self: Any, inputs: tuple[Any, ...]) -> list[Any]:
    """What the interpreter's `associative_scan` computes number by number, a slice at a time."""
    slices = [
        [self.to_tensor(part, value.dtype) for part in np.moveaxis(value.handle.data, self.axis, 0)]
        for value in inputs
    ]
    steps = list(zip(*slices, strict=True))
    scanned = [steps[0]]
    for step in steps[1:]:
        result = self.combine_fn.fn(*scanned[-1], *step)
        scanned.append(result if isinstance(result, tuple) else (result,))
    return [
        self.to_tensor(np.stack([part.handle.data for part in parts], self.axis), value.dtype)
        for parts, value in zip(zip(*scanned, strict=True), inputs, strict=True)
    ]
