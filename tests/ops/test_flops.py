"""FLOPs of the Triton kernels, as PyTorch's counter has them: those of the native operators."""

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton: pip install triton"
)

# Each operator alone in its process, where no other one's module has been imported.
PROGRAM = """
import sys
import torch
from torch.utils.flop_counter import FlopCounterMode
from anymamba import ops
from tests.support import operators
from tests.support.triton import with_triton

name = sys.argv[1]
inputs = {
    "causal_conv1d": lambda: operators.conv_inputs(2, 9, 5, 4),
    "selective_scan": lambda: operators.scan_inputs(2, 9, 6, 4),
    "ssd": lambda: operators.ssd_inputs(2, 9, 4, 3, 2, 5),
}


def run():
    if name in inputs:
        y = getattr(ops, name)(**operators.leaves(inputs[name]()))
        y.sum().backward()
    elif name == "causal_conv1d_update":
        x, window = torch.zeros(2, 5), torch.zeros(2, 5, 4)
        ops.causal_conv1d_update(x, window, torch.zeros(5, 4))
    elif name == "selective_state_update":
        given = operators.first_step(inputs["selective_scan"]())
        ops.selective_state_update(torch.zeros(2, 6, 4), **given)
    else:
        given = operators.first_step_of_heads(inputs["ssd"]())
        ops.ssd_state_update(torch.zeros(2, 4, 3, 5), **given)


def count():
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


with with_triton():
    run()  # the counter knows operators that were there when it began
    print(count())
with ops.backend("cpu"):
    print(count())
"""


@pytest.mark.parametrize(
    "name",
    [
        "causal_conv1d",
        "causal_conv1d_update",
        "selective_scan",
        "selective_state_update",
        "ssd",
        "ssd_state_update",
    ],
)
def test_triton_counts_what_the_core_does(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, name],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    of_triton, of_core = map(int, done.stdout.split())
    assert of_triton == of_core > 0
