"""The Triton kernels compiled and run on a GPU: right, always the same bits, and without races.

On the CPU in its place they are interpreted, at sizes that the interpreter can bear.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from anymamba import ops
from tests.support.operators import (
    CONVOLUTION,
    NORM,
    SCAN,
    SSD,
    Operator,
    conv_inputs,
    doubles,
    first_step,
    gradients,
    leaves,
    norm_inputs,
    scan_inputs,
    ssd_inputs,
)
from tests.support.tolerance import assert_contract, assert_gradients
from tests.support.triton import with_triton

Inputs = dict[str, Any]
HALF = torch.bfloat16


def _scan(b: int, l: int, e: int, n: int, dtype: torch.dtype = torch.float32) -> Inputs:
    return scan_inputs(b, l, e, n, dtype=dtype) | {"initial_state": torch.randn(b, e, n)}


SMALL: dict[str, tuple[Operator, Callable[[], Inputs]]] = {
    "scan": (SCAN, lambda: _scan(2, 19, 35, 3)),
    "convolution": (CONVOLUTION, lambda: conv_inputs(2, 19, 35, 4)),
    "norm": (NORM, lambda: norm_inputs(3, 35)),
    "ssd": (SSD, lambda: ssd_inputs(1, 19, 2, 5, 1, 3)),
}
# At the sizes of models, and so long that programs walk segments whole, and that they are split.
LARGE: dict[str, tuple[Operator, Callable[[], Inputs]]] = {
    "scan, split": (SCAN, lambda: _scan(1, 2100, 1536, 16)),
    "scan, whole segments": (SCAN, lambda: _scan(24, 300, 1536, 16)),
    "scan, bfloat16": (SCAN, lambda: _scan(2, 1000, 2560, 16, HALF)),
    "scan, many states": (SCAN, lambda: _scan(1, 200, 100, 256)),
    "convolution": (CONVOLUTION, lambda: conv_inputs(2, 2100, 1537, 4)),
    "convolution, bfloat16": (CONVOLUTION, lambda: conv_inputs(2, 1000, 1536, 4, dtype=HALF)),
    "norm": (NORM, lambda: norm_inputs(3, 700, 2560)),
    "ssd": (SSD, lambda: ssd_inputs(2, 1100, 24, 64, 1, 128)),
    "ssd, bfloat16": (SSD, lambda: ssd_inputs(2, 1100, 24, 64, 2, 64, HALF)),
}
CASES = {f"{name}, small": case for name, case in SMALL.items()} | LARGE


@pytest.fixture(autouse=True)
def _with_triton(device: torch.device) -> Iterator[None]:
    with with_triton():
        yield


def case_of(name: str, device: torch.device) -> tuple[Operator, Inputs]:
    if device.type == "cpu" and name in LARGE:
        pytest.skip("needs a GPU: the interpreter would take hours for the sizes of real models")
    operator, inputs = CASES[name]
    return operator, moved(inputs(), device)


def moved(inputs: Inputs, device: torch.device) -> Inputs:
    return {n: v.to(device) if isinstance(v, Tensor) else v for n, v in inputs.items()}


def run(operator: Operator, inputs: Inputs, **options: Any) -> tuple[Tensor, ...]:
    """The outputs, and the gradients of all inputs."""
    given = leaves(inputs)
    outputs = operator.call(given, **options)
    return (*outputs, *gradients(outputs, [torch.ones_like(o) for o in outputs], given).values())


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients(name: str, device: torch.device) -> None:
    operator, inputs = case_of(name, device)
    ours, theirs = leaves(inputs), leaves(doubles(inputs))
    found, expected = operator.call(ours), operator.reference(theirs)
    for output, reference in zip(found, expected, strict=True):
        assert output.device == device
        assert_contract(output.cpu(), reference.cpu())
    g = torch.Generator(device).manual_seed(7)
    given = [torch.randn(o.shape, generator=g, device=device).to(o.dtype) for o in found]
    actual, exact = gradients(found, given, ours), gradients(expected, given, theirs)
    assert_gradients(*({n: t.cpu() for n, t in side.items()} for side in (actual, exact)))


@pytest.mark.parametrize("name", CASES)
def test_twenty_runs_give_the_same_bits(name: str, device: torch.device) -> None:
    operator, inputs = case_of(name, device)
    first = run(operator, inputs)
    for _ in range(2 if device.type == "cpu" else 20):
        assert all(map(torch.equal, first, run(operator, inputs)))


@pytest.mark.parametrize("reverse", [False, True])
def test_packed_scan(reverse: bool, device: torch.device) -> None:
    lengths = [3, 0, 20] if device.type == "cpu" else [1, 700, 0, 16, 2000, 33]
    e = 5 if device.type == "cpu" else 1536
    inputs = moved(scan_inputs(1, sum(lengths), e, 3), device)
    inputs["initial_state"] = torch.randn(len(lengths), e, 3, device=device)
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
    found = SCAN.call(inputs, cu_seqlens=offsets, reverse=reverse)
    expected = SCAN.exactly(inputs, cu_seqlens=offsets, reverse=reverse)
    for output, reference in zip(found, expected, strict=True):
        assert_contract(output.cpu(), reference.cpu())


def test_a_million_steps(device: torch.device) -> None:
    """Offsets beyond 32 bits: the end of a long row is what it is when it is computed alone."""
    l, e = (50, 3) if device.type == "cpu" else (1 << 20, 2560)
    tail = 20 if device.type == "cpu" else 1000
    g = torch.Generator(device).manual_seed(0)
    x = torch.randn(1, l, e, generator=g, device=device, dtype=HALF)
    A = -torch.rand(e, 2, generator=g, device=device)
    maps = torch.randn(1, l, 2, generator=g, device=device, dtype=HALF)
    options = {"delta_softplus": True, "return_last_state": True}

    def scan(part: slice, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x_ble, B_bln = x[:, part], maps[:, part]
        return ops.selective_scan(x_ble, x_ble, A, B_bln, B_bln, initial_state=state, **options)

    end = slice(l - tail, l)
    y, last = scan(slice(0, l))
    rest, last_alone = scan(end, scan(slice(0, l - tail))[1])
    assert_contract(y[:, end].cpu(), rest.double().cpu())
    assert_contract(last.cpu(), last_alone.double().cpu())


def test_memory_of_the_backward_pass(device: torch.device) -> None:
    """Nothing of size b l e n is ever in memory: a state is kept for 64 steps, and the partial sums
    of dB and dC are as many as blocks of 32 channels.
    """
    if device.type == "cpu":
        pytest.skip("needs a GPU: the CPU's allocator does not count")
    b, l, e, n = 2, 4096, 2560, 64
    inputs = leaves(moved(scan_inputs(b, l, e, n, dtype=HALF), device))
    tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    y = ops.selective_scan(**inputs)
    torch.autograd.grad(y, tensors, torch.ones_like(y))
    taken = torch.cuda.max_memory_allocated(device) - before
    assert taken < b * l * e * n * 4 / 4


def test_steps_can_be_captured(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("needs a GPU: the CPU captures no graphs")
    inputs = moved(first_step(scan_inputs(2, 1, 64, 16)), device)
    state = torch.zeros(2, 64, 16, device=device)
    exact = state.double()
    ops.selective_state_update(state.clone(), **inputs)  # compiled before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.selective_state_update(state, **inputs)
    for _ in range(3):
        graph.replay()
        expected = ops.selective_state_update(exact, **doubles(inputs), backend="reference")
        assert_contract(y.cpu(), expected.cpu())
        assert_contract(state.cpu(), exact.cpu())


def test_another_gpu_than_the_current_one(device: torch.device) -> None:
    if device.type == "cpu" or torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    other = (torch.cuda.current_device() + 1) % torch.cuda.device_count()
    inputs = moved(_scan(2, 40, 35, 3), torch.device("cuda", other))
    for output, reference in zip(SCAN.call(inputs), SCAN.exactly(inputs), strict=True):
        assert_contract(output.cpu(), reference.cpu())


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(tool: str, device: torch.device) -> None:
    """NVIDIA's checks of memory, of races (in shared memory, not in global) and of barriers."""
    sanitizer = shutil.which("compute-sanitizer")
    if device.type == "cpu" or sanitizer is None:
        pytest.skip("needs a GPU and compute-sanitizer, which comes with the CUDA toolkit")
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", __name__],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def main() -> None:
    """All kernels, forward and backward, for the sanitizer to watch."""
    gpu = torch.device("cuda")
    packed = {"cu_seqlens": torch.tensor([0, 3, 300], device=gpu)}
    with ops.backend("triton"):
        for operator, inputs in SMALL.values():
            run(operator, moved(inputs(), gpu))
        run(SCAN, moved(_scan(1, 300, 35, 3), gpu))  # in splits, which are joined
        run(SCAN, moved(scan_inputs(1, 300, 35, 3), gpu), **packed)
        run(SSD, moved(ssd_inputs(1, 300, 2, 5, 1, 3), gpu))
        run(CONVOLUTION, moved(conv_inputs(1, 300, 35, 4, windows=2), gpu), **packed)
        steps = moved(first_step(scan_inputs(2, 1, 35, 3)), gpu)
        ops.selective_state_update(torch.zeros(2, 35, 3, device=gpu), **steps)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
