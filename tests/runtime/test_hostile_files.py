"""Files are hostile, and others use them too: nothing of that ends or disturbs a process."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from anymamba.checkpoint import source as sources
from anymamba.errors import CheckpointError
from anymamba.runtime.convert.conversion import convert
from anymamba.runtime.loading import load
from tests.support import files, gguf_files
from tests.support.processes import assert_ends_well, run_python

pytestmark = pytest.mark.slow

pytest.importorskip("anymamba._core")
pytest.importorskip("gguf")

CASES = "1500"
IDS = [5, 0, 319, 7, 7, 100]


def test_broken_files_are_refused_or_work(tmp_path: Path) -> None:
    """In a process of its own, with little memory, where a crash is a failed test."""
    arguments = ("-m", "tests.runtime.hostile", CASES, str(tmp_path))
    printed = assert_ends_well(run_python(*arguments, timeout=300, ANYMAMBA_NUM_THREADS="1"))
    counts = ast.literal_eval(printed.splitlines()[-1])
    assert counts["CheckpointError"] > int(CASES) / 10
    assert counts["StateError"] > int(CASES) / 50
    assert counts["worked"] > int(CASES) / 50  # the changes are small enough to reach the end


def test_what_takes_too_much_memory_would_be_noticed() -> None:
    """Without this, the test above could not fail by memory."""
    program = (
        "import resource, numpy\n"
        "from tests.runtime.hostile import MEMORY\n"
        "resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))\n"
        "numpy.zeros(MEMORY // 4, 'u1')\n"
        "numpy.zeros(MEMORY, 'u1')\n"
    )
    done = run_python("-c", program)
    assert done.returncode == 1
    assert "MemoryError" in done.stdout.splitlines()[-1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return files.write_folder(tmp_path / "model")


# Prints what a model says, many times; each time from the file anew.
READER = """
import hashlib, sys
from anymamba.runtime.loading import load
for _ in range(int(sys.argv[2])):
    logits = load(sys.argv[1], threads=1).logits([5, 0, 319, 7, 7, 100])
    print(hashlib.sha256(logits.tobytes()).hexdigest(), flush=True)
"""


def start(program: str, *arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def output(process: subprocess.Popen[str]) -> set[str]:
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return set(printed.split())


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_two_processes_read_one_model(kind: str, folder: Path) -> None:
    path = folder if kind == "folder" else gguf_files.write(folder.with_name("m.gguf"), "Q4_0")
    alone = output(start(READER, path, "1"))
    assert len(alone) == 1
    before = contents(folder)
    both = [start(READER, path, "40") for _ in range(2)]
    assert [output(process) for process in both] == [alone, alone]
    assert contents(folder) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


WRITER = """
import sys
from anymamba.runtime.convert.conversion import convert
for i in range(int(sys.argv[3])):
    convert(sys.argv[1], sys.argv[2], "gguf", ("f32", "q8_0")[i % 2], overwrite=True)
"""


def test_who_reads_a_file_that_is_replaced_sees_one_or_the_other(folder: Path) -> None:
    file = folder.with_name("model.gguf")
    versions = set()
    for weights in ("f32", "q8_0"):
        convert(folder, file, "gguf", weights, overwrite=True)
        versions |= output(start(READER, file, "1"))
    assert len(versions) == 2
    writer, reader = start(WRITER, folder, file, "60"), start(READER, file, "60")
    assert output(reader) <= versions
    output(writer)
    assert [entry.name for entry in folder.parent.iterdir()].count(file.name) == 1


@pytest.mark.parametrize("size", ["shorter", "longer", "alike"])
def test_a_file_replaced_between_header_and_weights_is_not_mixed(
    size: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header of one file would cut the bytes of another into wrong numbers."""
    opened = sources.open_checkpoint

    def replaced_meanwhile(path: Path) -> Any:
        checkpoint = opened(path)
        stored = files.tensors()
        if size == "alike":  # the same bytes in all, but another order
            a, b = (f"backbone.layers.{i}.mixer.in_proj.weight" for i in (0, 1))
            stored[a], stored[b] = stored[a].reshape(32, 128), stored[b].reshape(32, 128)
        else:
            dtype = np.float16 if size == "shorter" else np.float64
            stored = {name: tensor.astype(dtype) for name, tensor in stored.items()}
        save_file(stored, folder.with_name("newer"))
        folder.with_name("newer").replace(folder / "model.safetensors")
        return checkpoint

    monkeypatch.setattr(sources, "open_checkpoint", replaced_meanwhile)
    with pytest.raises(CheckpointError, match="replaced while"):
        convert(folder, folder.with_name("new"))
    assert not folder.with_name("new").exists()


def test_a_model_that_is_replaced_stays_for_who_has_it(folder: Path) -> None:
    """Its weights are mapped, not copied: the old file lives as long as it is mapped."""
    new = convert(folder, folder.with_name("new"))
    file = convert(folder, folder.with_name("model.gguf"), "gguf")
    engines = [load(new), load(file)]
    before = [engine.logits(IDS) for engine in engines]
    others = {name: -tensor for name, tensor in files.tensors().items()}
    source = files.write_folder(folder.with_name("others"), others)
    convert(source, new, overwrite=True)
    convert(source, file, "gguf", overwrite=True)
    for engine, logits, path in zip(engines, before, (new, file), strict=True):
        assert np.array_equal(engine.logits(IDS), logits)
        assert not np.array_equal(load(path).logits(IDS), logits)


SAVER = """
import sys
from anymamba.runtime.loading import load
engine = load(sys.argv[1], threads=1)
state = engine.prefill(engine.state(), [int(sys.argv[3])] * int(sys.argv[3]))
for _ in range(60):
    state.save(sys.argv[2])
"""


def test_two_processes_save_to_one_file(folder: Path) -> None:
    file = folder.with_name("text.state")
    engine = load(folder)
    engine.prefill(engine.state(), [3] * 3).save(file)
    savers = [start(SAVER, folder, file, str(count)) for count in (3, 4)]
    while any(process.poll() is None for process in savers):
        state = engine.load_state(file)  # at every moment one of the two, whole
        count = state.token_count
        expected = engine.prefill(engine.state(), [count] * count)
        np.testing.assert_array_equal(state.ssm_states, expected.ssm_states)
    assert all(output(process) == set() for process in savers)
    assert not [entry.name for entry in folder.parent.iterdir() if entry.name.startswith(".")]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.gguf"])
def test_what_is_no_file_is_refused_at_once(name: str, folder: Path) -> None:
    """A pipe would make its reader wait for ever."""
    path = folder / name if name != "model.gguf" else folder.with_name(name)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match=name.split(".")[0]):
        load(path if name == "model.gguf" else folder)


def test_shards_outside_the_folder_are_refused(folder: Path) -> None:
    secret: dict[str, Any] = dict.fromkeys(files.tensors(), "../secret.safetensors")
    (folder / "model.safetensors").rename(folder.with_name("secret.safetensors"))
    text = str({"weight_map": secret}).replace("'", '"')
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="secret"):
        load(folder)
    with pytest.raises(CheckpointError, match="secret"):
        convert(folder, folder.with_name("new"))
