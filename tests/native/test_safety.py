"""No input from Python ends the process, and no kernel leaves the memory it was given or lacks."""

import ast
import signal
import sys

import numpy as np
import pytest
import torch

from anymamba import _core
from tests.native.calls import CALLS, Array
from tests.support.processes import assert_ends_well, run_python

pytestmark = pytest.mark.slow

# Of each function and each instruction set; enough for every combination of absent arguments.
VALID_CALLS = "200"
WRONG_CALLS = "3000"


def test_kernels_stay_inside_what_they_are_given() -> None:
    """Each array ends, or begins, at a page whose touch ends the process."""
    printed = assert_ends_well(run_python("-m", "tests.native.bounds", VALID_CALLS))
    called = {tuple(line.split()[:2]) for line in printed.splitlines()}
    assert called == {(isa, name) for isa in _core.isas() for name in [*CALLS, "Mixer", "Model"]}


@pytest.mark.parametrize(("side", "place"), [("end", "4 * 5"), ("begin", "-4")])
def test_a_fence_ends_who_crosses_it(side: str, place: str) -> None:
    """Without this, the test above could not fail."""
    script = (
        "import ctypes, torch; from tests.native.fence import fenced\n"
        f"t = fenced(torch.zeros(5), {side!r})\n"
        "print(ctypes.c_float.from_address(t.data_ptr()).value, flush=True)\n"
        f"print(ctypes.c_float.from_address(t.data_ptr() + {place}).value)"
    )
    result = run_python("-c", script)
    assert result.returncode == -signal.SIGSEGV
    assert result.stdout.startswith("0.0\n")


def test_wrong_arguments_of_every_kind_are_refused() -> None:
    """A wrong call raises TypeError, ValueError or BufferError, or works; all of them happen."""
    printed = assert_ends_well(run_python("-m", "tests.native.fuzz", WRONG_CALLS))
    counts = ast.literal_eval(printed.splitlines()[-1])
    assert counts["ValueError"] > int(WRONG_CALLS) / 10
    assert counts["TypeError"] > int(WRONG_CALLS) / 10
    assert counts["worked"] > int(WRONG_CALLS) / 10


def test_the_calls_cover_every_function() -> None:
    settings = {"isa", "isas", "use_isa", "threads", "set_threads", "read_bandwidth"}
    settings |= {"threads_at_present", "peak_float_operations", "peak_byte_operations"}
    settings |= {"default_threads"}
    public = {name for name in dir(_core) if not name.startswith("_")}
    functions = {name for name in public if callable(getattr(_core, name))}
    assert public - functions == {"built_isas", "compiler", "system"}
    assert functions == settings | set(CALLS) | {"Mixer", "Model", "Watch"}
    assert all(isinstance(value, Array) for value in CALLS["conv_step"](_Fixed()).values() if value)


class _Fixed:
    """A random generator that always takes the first."""

    random = staticmethod(lambda: 0.9)
    randint = staticmethod(lambda low, high: low)
    choice = staticmethod(lambda values: values[0])


def test_messages_name_the_argument_and_both_shapes() -> None:
    x, A, B = np.zeros((2, 3, 4), "f4"), np.zeros((4, 5), "f4"), np.zeros((2, 3, 1, 5), "f4")
    rest = (None, None, None, False, None, None, 2, False)
    with pytest.raises(ValueError, match=r"delta has shape \(2, 3\), expected \(2, 3, 4\)"):
        _core.scan(x, x[..., 0], A, B, B, *rest, x.copy(), None, None)
    with pytest.raises(ValueError, match=r"y has shape \(2, 2, 4\), expected \(2, 3, 4\)"):
        _core.scan(x, x, A, B, B, *rest, x[:, :2].copy(), None, None)
    with pytest.raises(ValueError, match="A must be contiguous float32"):
        _core.scan(x, x, np.zeros((5, 4), "f4").T, B, B, *rest, x.copy(), None, None)
    with pytest.raises(ValueError, match=r"B must be float32, bfloat16 .* or float16"):
        _core.scan(x, x, A, B.astype("f8"), B, *rest, x.copy(), None, None)
    locked = x.copy()
    locked.flags.writeable = False
    with pytest.raises(TypeError):
        _core.scan(x, x, A, B, B, *rest, locked, None, None)
    with pytest.raises(TypeError):
        _core.scan(x, x, A, B)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((0, 0, 4, -1, -1), "segment 0 is outside"),
        ((0, 2, 1, -1, -1), "segment 0 is outside"),
        ((2, 0, 3, -1, -1), "segment 0 is outside"),
        ((0, -1, 3, -1, -1), "segment 0 is outside"),
        ((0, 0, 3, 2, -1), "segment 0 is outside"),
        ((0, 0, 3, -1, 2), "segment 0 is outside"),
        ((0, 0, 3, -2, -1), "segment 0 is outside"),
    ],
)
def test_segments_outside_of_the_batch_are_refused(row: tuple[int, ...], message: str) -> None:
    x = torch.zeros(2, 3, 4)
    table = torch.tensor([row]).T.contiguous()
    arguments = (None, False, None, table, 2, False, x.clone(), None)
    with pytest.raises(ValueError, match=message):
        _core.conv(x, torch.zeros(4, 2), *arguments)


def test_two_segments_that_leave_one_state_are_refused() -> None:
    x = torch.zeros(2, 3, 4)
    table = torch.tensor([[0, 0, 3, -1, 1], [1, 0, 3, -1, 1]]).T
    with pytest.raises(ValueError, match="two segments leave the same state"):
        _core.conv(x, torch.zeros(4, 2), None, False, None, table, 2, False, x.clone(), None)


# Their kernels take memory of their own; the others' work needs none.
TAKE_MEMORY = {"conv", "conv_backward", "norm_backward", "product", "quantized_product"}
TAKE_MEMORY |= {"scan", "scan_backward"}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the address space so")
@pytest.mark.parametrize("who", ["operators", "engine"])
def test_a_lack_of_memory_is_told_and_changes_nothing(who: str) -> None:
    # One heap for all threads, which can be filled.
    printed = assert_ends_well(
        run_python("-m", "tests.native.scarce", who, MALLOC_ARENA_MAX="1", timeout=300)
    )
    told = {name: int(count) for name, count in (line.split(": ") for line in printed.splitlines())}
    must = TAKE_MEMORY if who == "operators" else told.keys()
    assert len(told) >= 11
    assert {name for name in must if told[name] == 0} == set()
