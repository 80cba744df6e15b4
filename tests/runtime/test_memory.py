"""Memory does not grow with what is read or written."""

from pathlib import Path

import pytest

from anymamba.assets import bundled_model
from tests.support import processes
from tests.support.files import write_small

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path("/proc/self/statm").exists(), reason="reads its memory where Linux shows it"
    ),
]

# Prints the process's memory in megabytes after each part of the work.
SCRIPT = """
import resource, sys
import anymamba
engine = anymamba.load(sys.argv[1], threads=1, tokenizer=sys.argv[2])

def show():
    pages = int(open("/proc/self/statm").read().split()[1])
    print(pages * resource.getpagesize() / 1e6)

"""


def megabytes(tmp_path: Path, work: str) -> list[float]:
    """Of a model whose logits of 1,000 tokens alone would take a megabyte."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 256, "time_step_rank": 1}
    folder = write_small(tmp_path, **sizes)
    done = processes.python("-c", SCRIPT + work, folder, str(bundled_model()), check=True)
    return [float(line) for line in done.stdout.split()]


def test_writing_100_000_tokens(tmp_path: Path) -> None:
    """An object kept for each of the 80,000 tokens between would take some megabytes."""
    work = """
state = engine.state()
stream = engine.stream("a", 100_000, state=state, temperature=1.0, seed=0, stop=["no such text"])
for count, piece in enumerate(stream, start=1):
    if count in (20_000, 100_000):
        show()
assert state.token_count == 100_001
"""
    early, late = megabytes(tmp_path, work)
    assert late - early < 0.5


def test_short_texts_one_after_the_other(tmp_path: Path) -> None:
    """Each with a state of its own, a batch, a file: nothing of them stays."""
    work = """
for count in range(1, 301):
    state = engine.prefill(engine.state(), [count % 256] * 30)
    state.save(sys.argv[1] + "/a.state")
    engine.generate_batch(["a", "bc"], 3, state=engine.load_state(sys.argv[1] + "/a.state"))
    engine.score("some text", state.copy())
    if count in (100, 300):
        show()
"""
    early, late = megabytes(tmp_path, work)
    assert late - early < 0.5


def test_reading_and_scoring_a_long_text(tmp_path: Path) -> None:
    """Ten times the tokens take no more memory than they themselves and their scores do."""
    work = """
import numpy as np
texts = [np.arange(length) % 256 for length in (20_000, 200_000)]
for ids in texts:
    engine.prefill(engine.state(), ids)
    show()
for ids in texts:
    engine.score(ids)
    show()
"""
    fed, fed_more, scored, scored_more = megabytes(tmp_path, work)
    assert fed_more - fed < 4  # 1.4 MB are a copy of the tokens
    assert scored_more - scored < 20  # whole logits would be 200 MB
