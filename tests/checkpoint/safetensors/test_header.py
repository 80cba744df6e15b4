"""The header reader against the safetensors library, and against hostile files."""

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from anymamba.checkpoint import read_header
from anymamba.errors import CheckpointError
from tests.support import files
from tests.support.files import one_line
from tests.support.layouts import safetensors_bytes

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
}

shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
names = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__")


def refusal(file: Path) -> str:
    message = files.refusal(CheckpointError, read_header, file)
    assert file.name in message
    return message


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.dictionaries(names, st.tuples(st.sampled_from(sorted(DTYPES)), shapes), max_size=5))
def test_agrees_with_the_library(tmp_path_factory, wanted):
    file = tmp_path_factory.mktemp("agree") / "model.safetensors"
    tensors = {
        name: torch.randint(0, 2, shape).to(DTYPES[dtype])
        for name, (dtype, shape) in wanted.items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    header = read_header(file)
    assert header.metadata == {"format": "pt"}
    assert {n: (r.dtype, r.shape) for n, r in header.tensors.items()} == wanted
    data = file.read_bytes()
    for name, record in header.tensors.items():
        assert (record.file, record.name) == (file, name)
        expected = tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()
        assert data[record.begin : record.end] == expected


GOOD = save(
    {
        "backbone.norm_f.weight": torch.arange(3.0),
        "A_log": torch.ones(2, 2, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 7),
    },
    metadata={"format": "pt"},
)


@pytest.mark.parametrize("length", range(len(GOOD)))
def test_truncated_anywhere(tmp_path, length):
    file = tmp_path / "cut.safetensors"
    file.write_bytes(GOOD[:length])
    assert "truncated" in refusal(file)


def assert_safe_or_refused(file: Path) -> None:
    """What is accepted lies in the file without overlap, and the library accepts it too."""
    try:
        records = list(read_header(file).tensors.values())
    except CheckpointError as error:
        one_line(error)
        return
    size = file.stat().st_size
    occupied = sorted((record.begin, record.end) for record in records)
    for (_, end), (begin, _) in itertools.pairwise(occupied):
        assert end <= begin
    assert all(8 <= begin <= end <= size for begin, end in occupied)
    stored = dict(safetensors.deserialize(file.read_bytes()))
    assert {r.name: (r.dtype, list(r.shape)) for r in records} == {
        name: (tensor["dtype"], tensor["shape"]) for name, tensor in stored.items()
    }


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4),
    st.binary(max_size=3),
)
def test_damaged_bytes(tmp_path_factory, damage, tail):
    data = bytearray(GOOD)
    for place, value in damage:
        data[place] = value
    file = tmp_path_factory.mktemp("damage") / "model.safetensors"
    file.write_bytes(bytes(data) + tail)
    assert_safe_or_refused(file)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_random_bytes(tmp_path_factory, data, framed):
    file = tmp_path_factory.mktemp("random") / "model.safetensors"
    file.write_bytes(safetensors_bytes(data) if framed else data)
    assert_safe_or_refused(file)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
offsets = st.lists(st.integers(-1, 17), min_size=2, max_size=2)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "BF16"]) | json_values,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | json_values,
        "data_offsets": offsets | json_values,
    }
)
headers = st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), entries | json_values)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(headers, st.integers(0, 17))
def test_invented_headers(tmp_path_factory, header, size):
    file = tmp_path_factory.mktemp("invented") / "model.safetensors"
    file.write_bytes(safetensors_bytes(header, bytes(size)))
    assert_safe_or_refused(file)


@pytest.mark.parametrize(
    ("header", "size", "said"),
    [
        ({"x": entry("F99")}, 8, "dtype 'F99'"),
        ({"x": entry(dtype=7)}, 8, "dtype 7"),
        ({"x": entry(shape=[-2])}, 8, "shape [-2]"),
        ({"x": entry(shape=[-2, -1])}, 8, "shape [-2, -1]"),
        ({"x": entry(shape=[True, 2])}, 8, "shape [True, 2]"),
        ({"x": entry(shape=[2.0])}, 8, "shape [2.0]"),
        ({"x": entry(shape=[2**62, 2**62])}, 8, "needs"),
        ({"x": entry(shape=[2**63])}, 8, "whole numbers"),
        ({"x": entry(shape=[1] * 17)}, 8, "whole numbers"),
        ({"x": entry(shape="2")}, 8, "shape '2'"),
        ({"x": entry(offsets=[8, 0])}, 8, "span -8"),
        ({"x": entry(offsets=[0, 4])}, 8, "needs 8 bytes"),
        ({"x": entry(offsets=[0, 8, 9])}, 8, "data_offsets [0, 8, 9]"),
        ({"x": entry(), "y": entry()}, 8, "overlaps tensor 'x' by 8"),
        ({"x": entry(), "y": entry(offsets=[4, 12])}, 12, "overlaps tensor 'x' by 4"),
        ({"x": entry(offsets=[4, 12])}, 12, "4 bytes lie unused before tensor 'x'"),
        ({"x": entry()}, 9, "1 bytes lie unused after"),
        ({"x": entry()}, 7, "truncated"),
        ({"x": entry() | {"more": 1}}, 8, "exactly dtype, shape and data_offsets"),
        ({"x": [1, 2]}, 8, "exactly dtype"),
        ({"__metadata__": {"n": 1}}, 0, "__metadata__"),
        ({"__metadata__": "text"}, 0, "__metadata__"),
        (b'{"x": 1, "x": 2}', 0, "'x' stands twice"),
        (b'{"x": {"shape": [], "shape": []}}', 0, "'shape' stands twice"),
        (b"[1]", 0, "must hold a JSON object"),
        (b"{", 0, "not valid JSON"),
        (b"\xff{}", 0, "not UTF-8"),
        (b'{"a":' + b"[" * 100_000, 0, "deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", 0, "not valid JSON"),
        ({"line\nend " + "x" * 5000: entry("F99")}, 8, "line\\nend"),
        (b'{"\\ud800": 1}', 0, "\\ud800"),
    ],
)
def test_named_defects(tmp_path, header, size, said):
    file = tmp_path / "bad.safetensors"
    file.write_bytes(safetensors_bytes(header, bytes(size)))
    assert said in refusal(file)


def test_a_huge_header_is_refused_before_it_is_read(tmp_path):
    file = tmp_path / "huge.safetensors"
    file.write_bytes((2**63 + 5).to_bytes(8, "little") + b"{}")
    assert "claims 9223372036854775813 bytes" in refusal(file)


def test_not_a_file(tmp_path):
    assert "missing" in refusal(tmp_path / "nothing.safetensors")
    assert "not a file" in refusal(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are POSIX")
def test_a_named_pipe_does_not_hang(tmp_path):
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    assert "not a file" in refusal(pipe)
