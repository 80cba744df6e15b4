"""A safetensors file written tensor by tensor is the one that was planned, or an error."""

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from anymamba.checkpoint import read_header
from anymamba.checkpoint.safetensors import SafetensorsStream, TensorPlan

TENSORS = {
    "odd": np.arange(3, dtype=np.float32),
    "large": np.arange(64, dtype=np.float32).reshape(4, 16),
    "bytes": np.arange(128, dtype=np.uint8),
    "half": np.arange(5, dtype=np.float16),
    "none": np.empty((0, 4), np.float32),
}
DTYPES = {"float32": "F32", "uint8": "U8", "float16": "F16"}
PLANS = {name: TensorPlan(DTYPES[t.dtype.name], t.shape) for name, t in TENSORS.items()}


def test_the_library_reads_what_was_put_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with SafetensorsStream(path, PLANS, {"format": "pt"}) as stream:
        for name in ("half", "none", "large", "odd", "bytes"):
            stream.put(name, TENSORS[name].tobytes())
    read = load_file(path)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(read[name], tensor)
        assert read[name].dtype == tensor.dtype
    with safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_can_be_aligned_is(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with SafetensorsStream(path, PLANS) as stream:
        for name, tensor in TENSORS.items():
            stream.put(name, tensor.tobytes())
    records = read_header(path).tensors
    assert records["large"].begin % 64 == records["bytes"].begin % 64 == 0


@pytest.mark.parametrize(
    ("name", "data"), [("odd", bytes(11)), ("odd", bytes(13)), ("other", b""), ("half", bytes(10))]
)
def test_what_was_not_planned_is_an_error(tmp_path: Path, name: str, data: bytes) -> None:
    stream = SafetensorsStream(tmp_path / "model.safetensors", PLANS)
    stream.put("half", bytes(10))
    with pytest.raises(ValueError, match="is not what remains to be written"):
        stream.put(name, data)


def test_a_forgotten_tensor_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="4 tensors were not written: 'bytes'"),
        SafetensorsStream(tmp_path / "model.safetensors", PLANS) as stream,
    ):
        stream.put("half", bytes(10))
