"""GGUF files that are broken, hostile or of another model are refused in one line."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anymamba.checkpoint import expected_shapes
from anymamba.checkpoint.gguf.header import read_gguf_header
from anymamba.checkpoint.gguf.names import from_gguf_name, to_gguf_name
from anymamba.checkpoint.gguf.reader import read_gguf
from anymamba.errors import CheckpointError
from tests.support import gguf_files
from tests.support.files import one_line
from tests.support.gguf_files import by_the_package, refusal, widened

gguf = pytest.importorskip("gguf")
IN_PROJ = "backbone.layers.1.mixer.in_proj.weight"


@pytest.mark.parametrize("name", [*gguf_files.COUNTS, gguf_files.EPSILON])
def test_a_missing_value_is_named(name: str, file: Path) -> None:
    gguf_files.write(file, **{name.replace(".", "__"): None})
    assert name in refusal(file)


@pytest.mark.parametrize("name", ["token_embd.weight", "output_norm.weight", "blk.1.ssm_a"])
def test_a_missing_tensor_is_named(name: str, file: Path) -> None:
    stored = gguf_files.stored_tensors()
    del stored[name]
    gguf_files.write(file, "F32", stored)
    message = refusal(file)
    assert name in message or from_gguf_name(name) in message


@pytest.mark.parametrize("architecture", ["mamba3", "llama", "jamba"])
def test_other_architectures_are_named(architecture: str, file: Path) -> None:
    gguf_files.write(file, architecture=architecture)
    assert repr(architecture) in refusal(file)


def test_other_tensors_are_named(file: Path) -> None:
    stored = gguf_files.stored_tensors()
    stored["blk.01.ssm_d"] = stored["blk.1.ssm_d"]
    stored["blk.0.attn_q.weight"] = np.zeros((2, 32), np.float32)
    gguf_files.write(file, "F32", stored)
    message = refusal(file)
    assert "'blk.01.ssm_d'" in message
    assert "'blk.0.attn_q.weight'" in message


@pytest.mark.parametrize("kind", ["Q8_1", "Q8_K", "I8", "F64"])
def test_other_types_are_named(kind: str, file: Path) -> None:
    gguf_files.write(file, "F32")
    text = bytearray(file.read_bytes())
    place = text.index(b"blk.0.ssm_a") + len("blk.0.ssm_a") + 4 + 2 * 8  # two dimensions
    text[place : place + 4] = struct.pack("<I", gguf.GGMLQuantizationType[kind])
    file.write_bytes(text)
    assert f"type {kind};" in refusal(file)


def test_every_type_of_the_package_has_the_same_name_here(file: Path) -> None:
    from anymamba.checkpoint.gguf.blocks import OTHER_TYPES, TYPES

    ours = OTHER_TYPES | {number: found.name for number, found in TYPES.items()}
    theirs = {int(kind): kind.name for kind in gguf.GGMLQuantizationType}
    assert {number: theirs[number] for number in ours if number in theirs} == ours
    for number, (_, numbers, size) in TYPES.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)] == (numbers, size)
    readable = {int(kind) for kind in gguf.quants._type_traits}  # what the package widens
    assert readable | {0, 1} == TYPES.keys()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"mamba__ssm__dt_b_c_rms": 3}, "mamba.ssm.dt_b_c_rms is 3"),
        ({"mamba__ssm__dt_b_c_rms": True, "anymamba__mixer_rms_eps": "1"}, "mixer_rms_eps is '1'"),
        ({"mamba__ssm__inner_size": 63}, "inner_size"),
        ({"mamba__ssm__inner_size": 96}, "in_proj.weight is 128×32, expected 192×32"),
        ({"mamba__block_count": 3}, "layers.2"),
        ({"mamba__block_count": 2**31}, "num_hidden_layers"),
        ({"mamba__vocab_size": 321}, "embeddings"),
        ({"mamba__embedding_length": "32"}, "'32'"),
        ({"mamba__ssm__state_size": 2.5}, "state_size"),
        ({gguf_files.EPSILON.replace(".", "__"): -1.0}, "-1.0"),
        ({gguf_files.EPSILON.replace(".", "__"): float("nan")}, "nan"),
        ({"tokenizer__ggml__eos_token_id": 320}, "eos_token_id"),
        ({"general__alignment": 48}, "alignment"),
    ],
)
def test_values_that_make_no_sense_are_named(
    changes: dict[str, Any], word: str, file: Path
) -> None:
    gguf_files.write(file, **changes)
    assert word in refusal(file)


@pytest.mark.parametrize("value", [0.5, np.nan, -np.inf])
def test_an_a_that_no_a_log_gives_is_refused(value: float, file: Path) -> None:
    stored = gguf_files.stored_tensors()
    stored["blk.1.ssm_a"][3, 2] = value
    gguf_files.write(file, "F32", stored)
    assert "'blk.1.ssm_a'" in refusal(file)


def test_the_number_that_kernels_do_not_know_is_refused(file: Path) -> None:
    gguf_files.write(file, "Q8_0")
    record = read_gguf_header(file).tensors["blk.1.ssm_in.weight"]
    text = bytearray(file.read_bytes())
    text[record.begin + 2 + 7] = 0x80
    file.write_bytes(text)
    with pytest.raises(CheckpointError, match="-128"):
        dict(read_gguf(file, keep_blocks=True).tensors)
    exact = by_the_package(file)["blk.1.ssm_in.weight"]
    assert np.array_equal(read_gguf(file).tensors[IN_PROJ], exact)


@pytest.mark.parametrize(
    ("beginning", "word"),
    [
        (b"", "truncated"),
        (b"GGU", "truncated"),
        (b"GGML" + bytes(20), "does not begin with GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**64 - 1, 0), "truncated"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**64 - 1), "truncated"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63), "truncated"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "architecture None"),
    ],
)
def test_broken_beginnings(beginning: bytes, word: str, file: Path) -> None:
    file.write_bytes(beginning)
    assert word in refusal(file)


def test_no_file(file: Path) -> None:
    assert "missing" in refusal(file)
    file.mkdir()
    assert "not a file" in refusal(file)


def test_truncated_anywhere(file: Path) -> None:
    whole = gguf_files.write(file, "Q8_0").read_bytes()
    end = max(record.end for record in read_gguf_header(file).tensors.values())
    for length in [*range(0, end, 211), end - 1]:
        file.write_bytes(whole[:length])
        refusal(file)


def header(n_tensors: int, *parts: bytes) -> bytes:
    text = b"GGUF" + struct.pack("<IQQ", 3, n_tensors, 0) + b"".join(parts)
    return text + bytes(-len(text) % 32)


def entry(name: bytes, dimensions: list[int], kind: int = 0, offset: int = 0) -> bytes:
    shape = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
    return struct.pack("<Q", len(name)) + name + shape + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (header(1, entry(b"a", [8], offset=64)) + bytes(64), "truncated"),
        (header(1, entry(b"a", [2**62, 4])) + bytes(64), "truncated"),
        (header(1, entry(b"a", [2**63, 2**63, 2**63, 2**63])) + bytes(64), "truncated"),
        (header(1, entry(b"a", [8], offset=4)) + bytes(64), "multiple of 32"),
        (header(1, entry(b"a", [8, 0])) + bytes(64), "length 0"),
        (header(1, entry(b"a", [])) + bytes(64), "0 dimensions"),
        (header(1, entry(b"a", [1] * 5)) + bytes(64), "5 dimensions"),
        (header(1, entry(b"a", [16, 2], kind=8)) + bytes(64), "do not divide"),
        (header(1, entry(b"a", [8], kind=77)) + bytes(64), "unknown number 77"),
        (header(1, entry(b"\xff", [8])) + bytes(64), "UTF-8"),
        (header(2, entry(b"a", [9]), entry(b"b", [8], offset=32)) + bytes(64), "overlaps"),
        (header(2, entry(b"a", [8]), entry(b"a", [8], offset=32)) + bytes(64), "one name"),
    ],
)
def test_broken_lists_of_tensors(text: bytes, word: str, file: Path) -> None:
    file.write_bytes(text)
    assert word in refusal(file)


def value(name: bytes, kind: int, data: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + data


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ([value(b"a", 4, bytes(4))] * 2, "stands twice"),
        ([value(b"a", 99, bytes(4))], "unknown type 99"),
        ([value(b"a", 9, struct.pack("<IQ", 9, 1))], "unknown type 9"),  # a list of lists
        ([value(b"a", 9, struct.pack("<IQ", 0, 2**60))], "truncated"),
        ([value(b"a", 9, struct.pack("<IQ", 8, 2**60))], "truncated"),
        ([value(b"general.alignment", 4, bytes(4))], "alignment"),
        ([value(b"general.alignment", 8, struct.pack("<Q", 1) + b"8")], "alignment"),
        ([value(b"general.architecture", 9, struct.pack("<IQ", 4, 2) + bytes(8))], "architecture"),
    ],
)
def test_broken_values(values: list[bytes], word: str, file: Path) -> None:
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(values)) + b"".join(values))
    assert word in refusal(file)


def test_a_header_is_limited(file: Path) -> None:
    with file.open("wb") as stream:  # a sparse file: one value of 64 MB
        size = 64 << 20
        stream.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1))
        stream.write(value(b"a", 9, struct.pack("<IQ", 0, size)))
        stream.truncate(size + 1000)
    assert "allowed" in refusal(file)


GOOD: dict[str, bytes] = {}


@settings(max_examples=150)
@given(
    kind=st.sampled_from(["F16", "Q4_0"]),
    damage=st.lists(st.tuples(st.integers(0, 2600), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_damaged_headers(
    kind: str, damage: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("damage") / "model.gguf"
    if kind not in GOOD:
        GOOD[kind] = gguf_files.write(path, kind).read_bytes()
    text = bytearray(GOOD[kind])
    for place, byte in damage:
        text[place] = byte
    path.write_bytes(text)
    try:
        model = read_gguf(path)
        read = {name: np.array(tensor) for name, tensor in model.tensors.items()}
    except CheckpointError as error:
        one_line(error)
        return
    # What is accepted is what the package reads, and fits its config.
    theirs = by_the_package(path)
    assert {name: tensor.shape for name, tensor in read.items()} == expected_shapes(model.config)
    for name in (IN_PROJ, "backbone.norm_f.weight"):
        assert np.array_equal(widened(read[name]), theirs[to_gguf_name(name)], equal_nan=True)
