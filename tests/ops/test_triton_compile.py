"""The Triton kernels compile for GPUs that are not here: NVIDIA's (two generations) and AMD's.

The interpreter runs what a compiler may refuse, so that this is a proof of its own. It does not
show that the compiled kernels are right, or how fast they are.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.support.triton_cases import CASES

pytest.importorskip("triton", reason="needs Triton: pip install triton")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "hip:gfx942"])
def test_kernels_compile(target: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.triton_compile", target],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["kernel"].partition(":")[0] for kernel in kernels} == set(CASES)
    for kernel in kernels:
        # Other batches and lengths do not wait for a compiler again.
        assert not (kernel["new"] and "other length" in kernel["kernel"]), kernel
