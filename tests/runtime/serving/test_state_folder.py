"""States as files survive the program, within a budget, and are checked when they are read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import anymamba
from anymamba import Engine
from anymamba.errors import CheckpointError, InputError
from anymamba.runtime.serving import PrefixCache, StateFolder
from anymamba.runtime.serving.prefix_cache import key_of
from anymamba.runtime.state import State
from tests.support.reference import words
from tests.support.tolerance import assert_same


def read_text(engine: Engine, ids: list[int]) -> State:
    return engine.prefill(engine.state(), ids)


def cache_of(folder: Path, most_bytes: int = 1 << 30) -> PrefixCache:
    return PrefixCache(1 << 24, StateFolder(folder, most_bytes))


def fill(folder: Path, engine: Engine, counts: list[int], most_bytes: int = 1 << 30) -> None:
    files = StateFolder(folder, most_bytes)
    cache = PrefixCache(0, files)
    for count in counts:
        cache.keep("m", key_of(np.array(words(count))), read_text(engine, words(count)))
    files.close()


def test_a_restart_reads_nothing_again(engine: Engine, tmp_path: Path) -> None:
    fill(tmp_path, engine, [20, 50])
    found = cache_of(tmp_path).find("m", np.array(words(55)), engine.identity)
    assert (found.count, found.miss) == (50, "no such prefix")
    assert found.state is not None
    assert_same(found.state.ssm_states, read_text(engine, words(50)).ssm_states)


def test_another_model_finds_nothing(engine: Engine, tmp_path: Path) -> None:
    fill(tmp_path, engine, [20])
    bundled = anymamba.load()
    found = cache_of(tmp_path).find("m", np.array(words(20)), bundled.identity)
    assert (found.state, found.count) == (None, 0)


@pytest.mark.parametrize("damage", ["cut", "garbage", "removed"])
def test_a_broken_file_is_read_anew(engine: Engine, tmp_path: Path, damage: str) -> None:
    fill(tmp_path, engine, [20, 50])
    cache = cache_of(tmp_path)
    (file,) = tmp_path.glob("50-*")
    data = file.read_bytes()
    if damage == "removed":
        file.unlink()
    else:
        file.write_bytes(data[: len(data) // 2] if damage == "cut" else os.urandom(len(data)))
    assert cache.find("m", np.array(words(55)), engine.identity).count == 20
    assert not file.exists()


def test_the_budget_holds_and_the_last_used_stay(engine: Engine, tmp_path: Path) -> None:
    fill(tmp_path, engine, [5, 6, 7])
    for count in (5, 6, 7):  # several write at once, in any order
        (file,) = tmp_path.glob(f"{count}-*")
        os.utime(file, (count, count))
    files = StateFolder(tmp_path, int(3.5 * file.stat().st_size))
    cache = PrefixCache(0, files)
    assert cache.find("m", np.array(words(5)), engine.identity).count == 5  # used just now
    cache.keep("m", key_of(np.array(words(8))), read_text(engine, words(8)))
    files.close()
    assert sorted(int(file.name.split("-")[0]) for file in tmp_path.iterdir()) == [5, 7, 8]


def test_other_files_stay(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("dear diary")
    fill(tmp_path, engine, [5], most_bytes=0)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be used"):
        StateFolder(tmp_path / "file", 1)
    with pytest.raises(InputError, match="-1 bytes, expected 0 or more"):
        StateFolder(tmp_path, -1)


KILLED = """
import sys, numpy as np, anymamba
from anymamba.runtime.serving import PrefixCache, StateFolder
from anymamba.runtime.serving.prefix_cache import key_of
engine = anymamba.load()
cache = PrefixCache(1 << 24, StateFolder(sys.argv[1], 1 << 30))
for count in range(1, 10_000):
    ids = np.arange(count) % 256
    cache.keep("m", key_of(ids), engine.prefill(engine.state(), ids.tolist()))
    print(count, flush=True)
"""


def test_after_a_kill_each_file_is_whole_or_not_there(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        while program.stdout.readline() not in ("20\n", ""):
            pass
        program.send_signal(signal.SIGKILL)
    engine, cache = anymamba.load(), cache_of(tmp_path)
    written = [file.name for file in tmp_path.iterdir() if file.suffix == ".safetensors"]
    assert written
    for name in written:
        count = int(name.split("-")[0])
        assert cache.find("m", np.arange(count) % 256, engine.identity).count == count
