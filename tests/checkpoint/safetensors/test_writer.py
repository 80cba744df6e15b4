"""What lies in memory is written as the library reads it, types that its numpy lacks included."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from anymamba.checkpoint import TensorBytes, read_header, write_safetensors

# Sizes that are multiples of nothing, of 64 bytes, and nothing at all.
ARRAYS = {
    "b.odd": np.arange(7, dtype=np.float32).reshape(7, 1),
    "a.whole": np.arange(32, dtype=np.float32).reshape(2, 16),
    "one": np.array(2.5, np.float32),
    "half": np.array([1, -2, 65504], np.float16),
    "bytes": np.arange(5, dtype=np.uint8),
    "none": np.empty((3, 0, 2), np.float32),
    "é": np.array([1.5], np.float32),
}
DTYPES = {"float32": "F32", "uint8": "U8", "float16": "F16"}


def as_bytes(arrays: dict[str, np.ndarray]) -> dict[str, TensorBytes]:
    return {name: TensorBytes(DTYPES[a.dtype.name], a.shape, a.data) for name, a in arrays.items()}


@pytest.mark.parametrize("names", [list(ARRAYS), list(ARRAYS)[::-1], ["none"], ["bytes"], []])
@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt", "ü": 'a "quoted"\nline'}])
def test_the_library_reads_it(
    tmp_path: Path, names: list[str], metadata: dict[str, str] | None
) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, as_bytes({name: ARRAYS[name] for name in names}), metadata)
    read = load_file(path)
    assert read.keys() == set(names)
    for name in names:
        assert (read[name].dtype, read[name].shape) == (ARRAYS[name].dtype, ARRAYS[name].shape)
        np.testing.assert_array_equal(read[name], ARRAYS[name])
    with safe_open(path, "numpy") as file:
        assert (file.metadata() or {}) == (metadata or {})
    assert read_header(path).tensors.keys() == set(names)


def test_bfloat16(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch

    path = tmp_path / "model.safetensors"
    bits = np.array([[0x3FC0, 0xC000, 0x4040]], np.uint16)
    write_safetensors(path, {"x": TensorBytes("BF16", (1, 3), bits.tobytes())})
    assert torch.equal(load_torch(path)["x"], torch.tensor([[1.5, -2.0, 3.0]]).bfloat16())


def test_what_can_be_mapped_aligned_is(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, as_bytes(ARRAYS), {"format": "pt"})
    assert read_header(path).tensors["a.whole"].begin % 64 == 0
    assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 64 == 0


def test_the_same_tensors_are_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_safetensors(tmp_path / name, as_bytes(ARRAYS), {"format": "pt"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_that_is_there_is_overwritten_whole(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x" * 10_000)
    write_safetensors(path, as_bytes({"bytes": ARRAYS["bytes"]}))
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert json.loads(path.read_bytes()[8 : 8 + length]).keys() == {"bytes"}
    assert path.stat().st_size == 8 + length + 5


def test_a_full_disk_is_not_passed_over(tmp_path: Path) -> None:
    """Files are written by Python's own; the callers say what to do (see test_full_disk)."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_safetensors(tmp_path / "x", {"x": TensorBytes("U8", (5000,), bytes(5000))})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
