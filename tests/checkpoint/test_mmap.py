"""Tensors are the file's own bytes, or a copy where they lie crooked."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from anymamba.checkpoint import read_header
from anymamba.checkpoint.safetensors.mmap import FileMap
from anymamba.errors import CheckpointError
from anymamba.runtime.convert.conversion import convert
from tests.support import processes
from tests.support.files import write_small

VALUES = np.array([[1.5, -2.0, 3.0]], np.float32)


def written(path: Path, dtype: str, data: bytes, shape: list[int], lead: int) -> Path:
    """A file whose tensor begins `lead` bytes after an even address."""
    fields = {"x": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}
    text = json.dumps(fields).encode()
    text += b" " * ((lead - 8 - len(text)) % 64)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize("lead", [0, 1, 2, 3, 4])
@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        ("F32", VALUES),
        ("F16", VALUES.astype(np.float16)),
        ("BF16", np.array([[0x3FC0, 0xC000, 0x4040]], np.uint16)),
        ("U8", np.array([[1, 2, 255]], np.uint8)),
    ],
)
def test_values_and_sharing(tmp_path: Path, dtype: str, stored: np.ndarray, lead: int) -> None:
    path = written(tmp_path / "x.safetensors", dtype, stored.tobytes(), [1, 3], lead)
    record = read_header(path).tensors["x"]
    files = FileMap()
    array = files.array(record)
    assert array.dtype == stored.dtype
    assert (array == stored).all()
    assert not array.flags.writeable
    assert array.flags.aligned
    mapped = np.frombuffer(files.bytes_of(record), np.uint8)
    assert np.shares_memory(array, mapped) == (lead % stored.itemsize == 0)


def test_a_type_without_arithmetic_is_refused_by_name(tmp_path: Path) -> None:
    path = written(tmp_path / "x.safetensors", "F8_E4M3", bytes(3), [3], 0)
    with pytest.raises(CheckpointError, match=r"'x'.*F8_E4M3.*F32, F16, BF16"):
        FileMap().array(read_header(path).tensors["x"])


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    path = written(tmp_path / "x.safetensors", "F32", VALUES.tobytes(), [3], 0)
    record = read_header(path).tensors["x"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="shorter"):
        FileMap().array(record)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot read"):
        FileMap().array(record)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        FileMap().array(record)


SHORTENED = """
import os, sys
import anymamba
from anymamba.errors import CheckpointError

file = sys.argv[1]
engine = anymamba.load(file if file.endswith(".gguf") else os.path.dirname(file), sys.argv[2])
state = engine.prefill(engine.state(), [1, 2, 3])
os.truncate(file, os.path.getsize(file) // 2)
calls = {
    "feed": lambda: engine.prefill(state, [4]),
    "generate": lambda: engine.generate([4], 3),
    "batch": lambda: engine.generate_batch([[4], [5, 6]], 3),
    "logits": lambda: engine.logits([4], state),
    "save": lambda: state.save(file + ".state"),
}
for name, call in calls.items():
    try:
        call()
    except CheckpointError as error:
        assert "became shorter while it was in use" in str(error), error
    else:
        print(name, "passed")
assert state.token_count == 3
"""


@pytest.mark.skipif(os.name != "posix", reason="Windows does not shorten what is mapped")
@pytest.mark.parametrize("kind", ["auto", "int8"])
@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf"])
def test_a_file_that_is_shortened_in_place_is_an_error_and_not_the_end(
    name: str, kind: str, tmp_path: Path
) -> None:
    """In a process of its own, which the system would end by SIGBUS."""
    file = write_small(tmp_path, hidden_size=64, time_step_rank=4) / "model.safetensors"
    if name == "model.gguf":
        pytest.importorskip("gguf")
        file = convert(tmp_path, tmp_path / name, "gguf", "q8_0" if kind == "int8" else "f32")
    done = processes.python("-c", SHORTENED, file, kind)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_a_file_that_is_replaced_stays_for_those_who_mapped_it(tmp_path: Path) -> None:
    path = written(tmp_path / "x.safetensors", "F32", VALUES.tobytes(), [3], 0)
    array = FileMap().array(read_header(path).tensors["x"])
    other = written(tmp_path / "y.safetensors", "F32", bytes(12), [3], 0)
    other.replace(path)
    assert (array == VALUES[0]).all()
