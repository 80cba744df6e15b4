"""The thread pool: after fork, in data loaders, under many Python threads, at the end."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from anymamba import _core, ops
from tests.support.instruction_sets import ISAS
from tests.support.operators import scan_inputs
from tests.support.processes import assert_ends_well, run_python

pytestmark = pytest.mark.slow

# What the scripts share: a convolution of enough work for every thread, on numpy arrays.
WORK = """
import os, sys, threading, time
import numpy as np
from anymamba import _core

x = np.random.default_rng(0).standard_normal((2, 300, 200), dtype=np.float32)
weight = np.random.default_rng(1).standard_normal((200, 4), dtype=np.float32)

def work():
    y = np.empty_like(x)
    _core.conv(x, weight, None, True, None, None, 2, False, y, None)
    return y

def check(what):
    assert np.array_equal(work(), expected), what

_core.set_threads(3)
expected = work()
"""

FORK = """
for generation in range(3):
    children = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            for _ in range(20):
                check("in a child")
            grandchild = os.fork()
            if grandchild == 0:
                _core.set_threads(2)
                check("in a grandchild")
                os._exit(0)
            assert os.waitpid(grandchild, 0)[1] == 0
            check("in a child that has forked")
            os._exit(0)
        children.append(pid)
        check("in the parent")
    for pid in children:
        assert os.waitpid(pid, 0)[1] == 0, "a child failed"
print("done")
"""

FORK_WHILE_BUSY = """
stop = False

def keep_busy():
    while not stop:
        check("beside forks")

threads = [threading.Thread(target=keep_busy) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(20):
    pid = os.fork()
    if pid == 0:
        check("in a child of a busy process")
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
stop = True
for thread in threads:
    thread.join()
print("done")
"""

# The pool's threads still look for work when the interpreter and then the C++ objects go.
EXIT_AFTER_WORK = """
thread = threading.Thread(target=lambda: check("in another thread"))
thread.start()
check("at the end")
thread.join()
print("done")
"""

# A hook that computes when the program ends, before and after the pool was made, and a child too.
AT_EXIT = """
import atexit, anymamba

def last(what):
    check(what)
    engine.generate("a", max_new_tokens=3)
    if what == "done" and os.getpid() == parent:
        print(what)

atexit.register(last, "done")
engine = anymamba.load(threads=2)
atexit.register(last, "first")
parent = os.getpid()
pid = os.fork()
if pid == 0:
    sys.exit(3)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
"""


@pytest.mark.parametrize(
    "script",
    [FORK, FORK_WHILE_BUSY, EXIT_AFTER_WORK, AT_EXIT],
    ids=["fork after use", "fork in the midst of work", "exit after work", "work at exit"],
)
def test_a_process_of_its_own(script: str) -> None:
    """A pool that hangs in a child, or at the end, runs into the time limit."""
    printed = assert_ends_well(run_python("-c", WORK + script, timeout=60))
    assert printed == "done\n"


class Scans(Dataset[Tensor]):
    """Items that are computed by the operators."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        with ops.backend("cpu"):
            y = ops.selective_scan(**scan_inputs(1, 40, 70, 5, seed=index))
        assert isinstance(y, Tensor)
        return y[0]


def test_workers_of_a_data_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYMAMBA_NUM_THREADS", "2")
    data = Scans()
    # Before the workers are forked, so that they inherit a pool in use.
    expected = torch.stack([data[index] for index in range(len(data))])
    loader = DataLoader(
        data, batch_size=3, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    for _ in range(2):
        assert torch.equal(torch.cat(list(loader)), expected)
        assert torch.equal(data[3], expected[3])


def test_many_python_threads_at_once() -> None:
    """The pool serves one of them; the others work alone. Each gets its own result."""
    calls = [scan_inputs(2, 60, 90, 7, seed=seed) for seed in range(8)]
    with ops.backend("cpu"):
        expected = [ops.selective_scan(**call) for call in calls]
    together = threading.Barrier(len(calls))

    def repeatedly(index: int) -> bool:
        together.wait()
        with ops.backend("cpu"):
            results = [ops.selective_scan(**calls[index]) for _ in range(20)]
        return all(torch.equal(result, expected[index]) for result in results)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(len(calls)) as threads:
        patch.setenv("ANYMAMBA_NUM_THREADS", "3")
        assert all(threads.map(repeatedly, range(len(calls))))


def test_gradients_from_many_python_threads() -> None:
    """Autograd goes back on threads of its own, which call the core too."""
    call = scan_inputs(2, 60, 20, 7)
    call["x_ble"].requires_grad_()

    def gradient(_: int) -> Tensor:
        with ops.backend("cpu"):
            y = ops.selective_scan(**call)
        (found,) = torch.autograd.grad(y.sum(), call["x_ble"])
        return found

    expected = gradient(0)
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(gradient, range(40)):
            assert torch.equal(found, expected)


def test_the_interpreter_goes_on_while_a_kernel_runs() -> None:
    """Kernels run without the GIL, so that another thread's Python does not wait for them."""
    x = np.zeros((4, 20_000, 64), np.float32)
    ticks: list[int] = []
    done = threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks.append(1)
            done.wait(0.001)

    thread = threading.Thread(target=tick)
    _core.set_threads(1)
    weight, y = np.zeros((64, 8), np.float32), np.empty_like(x)
    thread.start()
    while not ticks:
        pass
    before = len(ticks)
    _core.conv(x, weight, None, True, None, None, 4, False, y, None)
    during = len(ticks) - before
    done.set()
    thread.join()
    assert during > 1


def test_the_number_of_threads_is_kept_in_bounds() -> None:
    for asked, given in ((0, 1), (-7, 1), (1, 1), (3, 3), (2**31 - 1, 4096)):
        _core.set_threads(asked)
        assert _core.threads() == given
    with pytest.raises(TypeError):
        _core.set_threads(2**40)
    _core.set_threads(2)


def test_more_threads_than_there_is_work_or_there_are_cores() -> None:
    call = scan_inputs(1, 3, 2, 2)
    with ops.backend("cpu"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANYMAMBA_NUM_THREADS", "1")
        expected = ops.selective_scan(**call)
        patch.setenv("ANYMAMBA_NUM_THREADS", "64")
        assert torch.equal(ops.selective_scan(**call), expected)


@pytest.mark.parametrize("isa", ISAS)
def test_the_environment_chooses_the_instruction_set(isa: str) -> None:
    script = "from anymamba import _core; print(_core.isa(), _core.isas()[0])"
    printed = assert_ends_well(run_python("-c", script, ANYMAMBA_ISA=isa))
    assert printed.split()[0] == isa
    # None named is the best.
    printed = assert_ends_well(run_python("-c", script, ANYMAMBA_ISA=""))
    assert printed.split()[0] == printed.split()[1]


def test_an_instruction_set_that_is_not_there_is_named() -> None:
    script = "from anymamba import _core; _core.isa()"
    result = run_python("-c", script, ANYMAMBA_ISA="mmx")
    assert result.returncode == 1
    assert "ANYMAMBA_ISA is 'mmx', which this machine does not have; it has" in result.stdout
    assert result.stdout.rstrip().endswith(f" {_core.isas()[-1]}")
    with pytest.raises(ValueError, match="does not have the instruction set mmx"):
        _core.use_isa("mmx")
