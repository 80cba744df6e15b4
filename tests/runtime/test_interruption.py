"""What Ctrl-C, a lack of memory and the end of the program leave behind."""

import copy
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import anymamba
from anymamba.runtime.native import core
from tests.support import processes

pytestmark = pytest.mark.slow

IDS = list(b"To be, or not to be: that is the question. " * 400)


@pytest.fixture(scope="module")
def engine():
    return anymamba.load(threads=2)


@pytest.mark.parametrize("method", ["feed", "logits", "score", "generate"])
@pytest.mark.parametrize("after", [0.003, 0.02, 0.06])
def test_an_interrupted_state_continues_as_what_it_has_read(engine, method, after):
    state = engine.state()
    calls = {
        "feed": lambda: engine.prefill(state, IDS),
        "logits": lambda: engine.logits(IDS, state),
        "score": lambda: engine.score(IDS, state),
        "generate": lambda: engine.generate(IDS[:600], max_new_tokens=500, state=state),
    }
    timer = threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT))
    try:
        timer.start()
        calls[method]()
        time.sleep(2)
    except KeyboardInterrupt:
        pass
    if state.token_count and method != "generate":
        whole = engine.prefill(engine.state(), IDS[: state.token_count])
        assert np.abs(state.ssm_states - whole.ssm_states).max() < 1e-4
        assert state.logits is not None
        assert np.abs(state.logits - whole.logits).max() < 1e-3
    engine.generate("" if state.token_count else "a", max_new_tokens=2, state=state)


def test_the_same_numbers_on_any_number_of_threads():
    logits = [anymamba.load(threads=n).logits(IDS[:300]) for n in (1, 2, 5)]
    assert np.array_equal(logits[0], logits[1])
    assert np.array_equal(logits[0], logits[2])


def test_threads_that_come_late_change_no_number():
    """Beside busy processes fewer threads take part for a while, from one token to the next."""

    def text(threads):
        engine = anymamba.load(threads=threads)
        state = engine.state()
        ids = engine.generate("ROMEO:", max_new_tokens=60, temperature=0, state=state).ids
        assert 1 <= core().threads_at_present() <= threads
        return ids, state.ssm_states.copy(), engine.logits(IDS[:200])

    expected = text(1)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        for threads in (4, 2, 7):
            ids, states, logits = text(threads)
            assert ids == expected[0]
            assert np.array_equal(states, expected[1])
            assert np.array_equal(logits, expected[2])
    finally:
        for process in busy:
            process.kill()
            process.wait()


PROGRAM = """
import threading, time, anymamba
engine = anymamba.load(threads=2)
ids = list(b"x y z " * 3000)
def work():
    while True: engine.{call}
threading.Thread(target=work, daemon=True).start()
time.sleep(0.3)
raise SystemExit(7)
"""


@pytest.mark.parametrize("call", ["prefill(engine.state(), ids)", "generate('a', 50)"])
def test_a_program_ends_with_its_own_status_while_a_daemon_thread_computes(call):
    done = processes.python("-c", PROGRAM.format(call=call))
    assert (done.returncode, done.stderr) == (7, "")


def test_a_copy_shares_no_memory_and_a_pickle_is_refused_by_name(engine):
    state = engine.prefill(engine.state(), "ROMEO:")
    for twin in (copy.copy(state), copy.deepcopy(state)):
        assert not np.shares_memory(twin.ssm_states, state.ssm_states)
        assert np.array_equal(twin.ssm_states, state.ssm_states)
    with pytest.raises(TypeError, match=r"State cannot be pickled.*State\.save"):
        pickle.dumps(state)
