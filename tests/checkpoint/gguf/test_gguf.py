"""GGUF files, against the `gguf` package's own reader, scalar loops, and llama.cpp's tokenizer."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from anymamba.checkpoint import expected_shapes
from anymamba.checkpoint.gguf.header import read_gguf_header
from anymamba.checkpoint.gguf.names import from_gguf_name, to_gguf_name
from anymamba.checkpoint.gguf.reader import read_gguf
from anymamba.checkpoint.gguf.tokenizer import tokenizer_json
from anymamba.checkpoint.gguf.writer import GGUF_WEIGHTS, write_gguf
from anymamba.checkpoint.quantization import QuantizedArray
from anymamba.errors import CheckpointError, ConfigError, MissingDependencyError
from anymamba.runtime.weights.gguf import load_gguf_weights
from tests.support import gguf_files, tiny_files
from tests.support.tiny_files import CONFIG, TEXT, one_line

gguf = pytest.importorskip("gguf")

IN_PROJ = "backbone.layers.1.mixer.in_proj.weight"
KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0"]
LISTS = ("model", "pre", "tokens", "token_type", "merges")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        dict(read_gguf(path).tensors)
    message = one_line(caught.value)
    assert path.name in message
    return message


def widened(values: Any) -> Any:
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def by_the_package(path: Path) -> dict[str, Any]:
    """Every tensor as the package itself reads it, in float32."""
    return {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(path).tensors
    }


# Reading


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_reads_what_the_package_reads(kind: str, tied: bool, file: Path) -> None:
    gguf_files.write(file, kind, gguf_files.stored_tensors(tied))
    model, theirs = read_gguf(file), by_the_package(file)
    assert list(model.tensors) == list(tiny_files.tensors(tied))
    for name, ours in model.tensors.items():
        if name.endswith("A_log"):
            continue
        expected = theirs[to_gguf_name(name)]
        if name.endswith("conv1d.weight"):
            expected = expected[:, None]
        assert np.array_equal(widened(ours), expected), name


def test_reads_the_config(file: Path) -> None:
    gguf_files.write(file, tokenizer__ggml__eos_token_id=3, tokenizer__ggml__padding_token_id=4)
    config = read_gguf(file).config
    assert CONFIG.items() <= config.items()
    assert (config["eos_token_id"], config["pad_token_id"]) == (3, 4)
    assert "bos_token_id" not in config


def test_a_log_comes_back(file: Path) -> None:
    # A is rounded to 24 bits, which moves its logarithm by 2^-24, and so is the logarithm.
    gguf_files.write(file)
    name = "backbone.layers.0.mixer.A_log"
    ours, expected = read_gguf(file).tensors[name], tiny_files.tensors()[name]
    np.testing.assert_allclose(ours, expected, rtol=2**-23, atol=2**-22)
    assert ours.dtype == np.float32


def test_an_a_of_zero_remembers_for_ever(file: Path) -> None:
    stored = gguf_files.stored_tensors()
    stored["blk.0.ssm_a"][0, 0] = 0
    gguf_files.write(file, "F32", stored)
    assert read_gguf(file).tensors["backbone.layers.0.mixer.A_log"][0, 0] == -np.inf


def test_plain_tensors_are_not_copied(file: Path) -> None:
    gguf_files.write(file, "F16")
    tensors = read_gguf(file).tensors
    for name in (IN_PROJ, "backbone.norm_f.weight"):
        assert not tensors[name].flags.owndata
        assert not tensors[name].flags.writeable


def number_by_number(blocks: Any, kind: str, scale_of: Any) -> Any:
    """Decode blocks of 32 as ggml's documentation says, one number at a time."""
    values = np.empty((len(blocks), 32), np.float64)
    for block, row in zip(blocks, values, strict=True):
        scale = scale_of(struct.unpack("<e", bytes(block[:2]))[0])
        for i in range(32):
            if kind == "Q8_0":
                row[i] = scale * struct.unpack("b", bytes(block[2 + i : 3 + i]))[0]
            else:
                byte = int(block[2 + i % 16])
                row[i] = scale * ((byte >> 4 if i >= 16 else byte & 15) - 8)
    return values


def as_bfloat16(value: float) -> float:
    """Rounded to 8 bits by arithmetic alone."""
    mantissa, exponent = np.frexp(value)
    return float(np.ldexp(np.rint(np.ldexp(mantissa, 8)), exponent - 8))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_blocks_become_our_groups(kind: str, file: Path) -> None:
    stored = gguf_files.stored_tensors()
    stored["blk.1.ssm_in.weight"][0, :32] = 0  # a block whose scale is zero
    gguf_files.write(file, kind, stored)
    raw = {t.name: t.data for t in gguf.GGUFReader(file).tensors}["blk.1.ssm_in.weight"]
    blocks = raw.reshape(-1, 34 if kind == "Q8_0" else 18)
    exact = number_by_number(blocks, kind, float).reshape(128, 32)
    assert np.array_equal(read_gguf(file).tensors[IN_PROJ], exact)

    kept = read_gguf(file, keep_blocks=True).tensors[IN_PROJ]
    assert isinstance(kept, QuantizedArray)
    assert (kept.bits, kept.group, kept.shape) == (int(kind[1]), 32, (128, 32))
    values = kept_values(kept)
    assert np.array_equal(values, number_by_number(blocks, kind, as_bfloat16).reshape(128, 32))
    assert (np.abs(values - exact) <= np.abs(exact) / 256).all()  # 8 bits are kept of the scale
    assert (values != exact).any()


def kept_values(kept: QuantizedArray) -> Any:
    """What the format in the working agreement says, spelt out."""
    scales = np.repeat(widened(kept.scales).astype(np.float64), 32, axis=1)
    if kept.bits == 8:
        return scales * (kept.q.astype(int) - 128)
    bytes_ng = kept.q.reshape(*kept.scales.shape, 16).astype(int)
    numbers = np.concatenate([bytes_ng & 15, bytes_ng >> 4], axis=2)
    return scales * (numbers.reshape(kept.shape) - 8)


def test_only_matrices_are_kept_in_blocks(file: Path) -> None:
    tensors = read_gguf(gguf_files.write(file, "Q4_0"), keep_blocks=True).tensors
    kept = {name for name, tensor in tensors.items() if isinstance(tensor, QuantizedArray)}
    assert kept == {"backbone.embeddings.weight"} | {
        f"backbone.layers.{layer}.mixer.{part}_proj.weight"
        for layer in (0, 1)
        for part in ("in", "x", "out")
    }


@pytest.mark.parametrize(
    ("stored", "asked", "kind"),
    [
        ("F32", "auto", "f32"),
        ("F16", "auto", "f16"),
        ("BF16", "auto", "bf16"),
        ("Q8_0", "auto", "int8"),
        ("Q4_0", "int4", "int4"),
        ("Q8_0", "f32", "f32"),
        ("Q4_0", "bf16", "bf16"),
    ],
)
def test_weights_for_the_engine(stored: str, asked: str, kind: str, file: Path) -> None:
    weights, _ = load_gguf_weights(gguf_files.write(file, stored), asked)
    assert weights.kind == kind
    embeddings = weights.tensors["backbone.embeddings.weight"]
    if kind.startswith("int"):
        assert isinstance(embeddings, QuantizedArray)
    else:
        assert embeddings.dtype == {"f32": "f4", "f16": "f2", "bf16": "u2"}[kind]
    assert len(weights.digest()) == 64


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_says_what_the_values_say(kind: str, file: Path) -> None:
    """The file in the engine, against a folder that holds its values in float32."""
    pytest.importorskip("anymamba._core")
    from anymamba.runtime.loading import load

    gguf_files.write(file, kind)
    exact = {name: widened(tensor) for name, tensor in read_gguf(file).tensors.items()}
    folder = tiny_files.write_folder(file.parent / "folder", exact)
    expected, ids = load(folder), [5, 0, 319, 7, 7, 100]
    largest = np.abs(expected.logits(ids)).max()
    # Blocks round activations to 8 bits too; else this is the figure for whole models.
    tolerance = {"Q8_0": 2e-2, "Q4_0": 2e-2, "BF16": 2e-2}.get(kind, 1e-4)
    assert np.abs(load(file).logits(ids) - expected.logits(ids)).max() < tolerance * largest
    assert load(file).weights_kind == {"Q8_0": "int8", "Q4_0": "int4"}.get(kind, kind.lower())
    assert np.abs(load(file, "f32").logits(ids) - expected.logits(ids)).max() < 1e-4 * largest


def test_the_engine_takes_the_files_tokenizer(file: Path) -> None:
    pytest.importorskip("anymamba._core")
    from anymamba.runtime.loading import load

    tokenizer = tiny_files.tokenizer()
    changes = lists_of(tokenizer) | {"tokenizer__ggml__eos_token_id": 9}
    engine = load(gguf_files.write(file, **changes))
    assert engine.tokenize(TEXT) == tokenizer.encode(TEXT).ids
    assert engine.end_ids == (9,)
    gguf_files.write(file, **changes | {"tokenizer__ggml__model": "llama"})
    with pytest.raises(CheckpointError, match="'llama'"):
        load(file)
    named = file.with_name("tokenizer.json")
    named.write_text(tokenizer.to_str())
    assert load(file, tokenizer=named).tokenize(TEXT) == tokenizer.encode(TEXT).ids


def test_weights_are_not_rounded_twice(file: Path) -> None:
    with pytest.raises(ConfigError, match="int4"):
        load_gguf_weights(gguf_files.write(file, "Q4_0"), "int8")


# Refusing


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


@pytest.mark.parametrize("architecture", ["mamba2", "llama", "jamba"])
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
        ({"mamba__ssm__dt_b_c_rms": True}, "Falcon"),
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


# Tokenizers


def lists_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """A tokenizer as llama.cpp's converter writes it."""
    fields = json.loads(tokenizer.to_str())
    added = {token["id"]: token["special"] for token in fields["added_tokens"]}
    size = tokenizer.get_vocab_size()
    return {
        "tokenizer__ggml__model": "gpt2",
        "tokenizer__ggml__pre": "olmo",
        "tokenizer__ggml__tokens": [*map(tokenizer.id_to_token, range(size)), "[PAD]", "[PAD2]"],
        "tokenizer__ggml__token_type": [
            *({None: 1, True: 3, False: 4}[added.get(i)] for i in range(size)),
            *(5, 5),
        ],
        "tokenizer__ggml__merges": [" ".join(pair) for pair in fields["model"]["merges"]],
    }


texts = st.text(st.sampled_from("aeiostTH't.,!?129 \n\té中𝔘\u0301")) | st.text()


@settings(max_examples=100)
@given(text=texts)
def test_the_lists_make_the_same_tokenizer(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    original, made = both_tokenizers(tmp_path_factory)
    text = text.encode("utf-8", "ignore").decode() + "<|end|>" + TEXT[:40]
    assert made.encode(text).ids == original.encode(text).ids
    ids = original.encode(text).ids
    assert made.decode(ids) == original.decode(ids)
    assert made.decode(ids, skip_special_tokens=False).endswith("<|end|>" + TEXT[:40])


BOTH: list[Tokenizer] = []


def both_tokenizers(factory: pytest.TempPathFactory) -> list[Tokenizer]:
    if not BOTH:
        original = tiny_files.tokenizer()
        path = gguf_files.write(factory.mktemp("lists") / "m.gguf", **lists_of(original))
        text = read_gguf(path).tokenizer_json
        assert text is not None
        BOTH.extend([original, Tokenizer.from_str(text)])
        assert "[PAD]" not in BOTH[1].get_vocab()
    return BOTH


def test_tokens_around_every_text(file: Path) -> None:
    changes = lists_of(tiny_files.tokenizer()) | {
        "tokenizer__ggml__add_bos_token": True,
        "tokenizer__ggml__bos_token_id": 0,
        "tokenizer__ggml__add_eos_token": True,
        "tokenizer__ggml__eos_token_id": 7,
    }
    text = read_gguf(gguf_files.write(file, **changes)).tokenizer_json
    assert text is not None
    made = Tokenizer.from_str(text)
    plain = tiny_files.tokenizer().encode(TEXT).ids
    assert made.encode(TEXT).ids == [0, *plain, 7]
    assert made.encode(TEXT, add_special_tokens=False).ids == plain


@pytest.mark.parametrize("name", ["no_vocab", "none", None])
def test_no_tokenizer(name: str | None, file: Path) -> None:
    assert read_gguf(gguf_files.write(file, tokenizer__ggml__model=name)).tokenizer_json is None


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model": "llama"}, "'llama'"),
        ({"model": 3}, "kind is 3"),
        ({"model": [1, 2]}, "kind is (1, 2)"),
        ({"pre": "llama-bpe"}, "'llama-bpe'"),
        ({"pre": [1, 2]}, "(1, 2)"),
        ({"add_space_prefix": True}, "space"),
        ({"tokens": None}, "tokens"),
        ({"tokens": [1, 2, 3]}, "tokens"),
        ({"tokens": ["a", "a"]}, "twice"),
        ({"token_type": [1, 2]}, "token_type"),
        ({"token_type": "many"}, "token_type"),
        ({"merges": None}, "merges"),
        ({"merges": ["ab"]}, "'ab'"),
        ({"merges": ["a "]}, "'a '"),
        ({"add_bos_token": True}, "bos_token_id is None"),
    ],
)
def test_tokenizers_that_cannot_be_read(changes: dict[str, Any], word: str, file: Path) -> None:
    lists = lists_of(tiny_files.tokenizer())
    lists |= {f"tokenizer__ggml__{name}": value for name, value in changes.items()}
    message = refusal(gguf_files.write(file, **lists))
    assert word in message


def test_llama_cpp_makes_the_same_tokens(file: Path) -> None:
    """Its rule for cutting text is the one meant by these names."""
    llama_cpp = pytest.importorskip("llama_cpp")
    tokenizer = tiny_files.tokenizer()
    write_gguf(file, CONFIG, tiny_files.tensors(), tokenizer_json=tokenizer.to_str())
    metadata = read_gguf_header(file).metadata
    del metadata["tokenizer.huggingface.json"]
    from_lists = tokenizer_json(metadata, "the lists")
    assert from_lists is not None
    ours = Tokenizer.from_str(from_lists)
    theirs = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    for text in (TEXT, "é中𝔘 ¿que?", "a    b  c   d", "12345 'll don't", "x<|end|>y", "\r\n \n"):
        expected = theirs.tokenize(text.encode(), add_bos=False, special=True)
        assert ours.encode(text).ids == expected, text
        assert tokenizer.encode(text).ids == expected, text


@pytest.mark.parametrize("name", ["gpt-2", "mpt", "olmo"])
def test_llama_cpp_cuts_alike_by_all_these_names(name: str, file: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    tokenizer = tiny_files.tokenizer()
    gguf_files.write(
        file,
        **lists_of(tokenizer) | {"tokenizer__ggml__pre": name},
        mamba__context_length=64,
        mamba__vocab_size=320,
    )
    theirs = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    for text in (TEXT, "12345 'll DON'T don't", "\r\n \n"):
        assert tokenizer.encode(text).ids == theirs.tokenize(text.encode(), False, True)


# Writing


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("weights", GGUF_WEIGHTS)
def test_writes_what_the_package_writes(weights: str, tied: bool, file: Path) -> None:
    config = CONFIG | {"tie_word_embeddings": tied}
    write_gguf(file, config, tiny_files.tensors(tied), weights)
    expected = gguf_files.write(
        file.with_name("theirs.gguf"), weights.upper(), gguf_files.stored_tensors(tied)
    )
    ours = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(expected).tensors}
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].tensor_type == tensor.tensor_type, name
        if name.endswith("ssm_a"):  # an exponential in float64 here, in float32 there
            np.testing.assert_allclose(ours[name].data, tensor.data, rtol=2**-22)
        else:
            assert np.array_equal(ours[name].data, tensor.data), name


def test_a_tokenizer_comes_back_whole(file: Path) -> None:
    text = tiny_files.tokenizer().to_str()
    write_gguf(file, CONFIG, tiny_files.tensors(), tokenizer_json=text, chat_template="{{ x }}")
    model = read_gguf(file)
    assert (model.tokenizer_json, model.chat_template) == (text, "{{ x }}")


def test_a_tokenizer_that_llama_cpp_lacks_is_kept_whole_alone(file: Path) -> None:
    fields = json.loads(tiny_files.tokenizer().to_str())
    fields["pre_tokenizer"]["use_regex"] = False
    text = json.dumps(fields)
    write_gguf(file, CONFIG, tiny_files.tensors(), tokenizer_json=text)
    metadata = read_gguf_header(file).metadata
    assert metadata["tokenizer.ggml.model"] == "no_vocab"
    assert "tokenizer.ggml.tokens" not in metadata
    assert read_gguf(file).tokenizer_json == text


@pytest.mark.parametrize(
    "text", ["{}", "x", '{"model": {"type": "BPE", "vocab": {"\\ud800": 0}, "merges": []}}']
)
def test_a_broken_tokenizer_is_not_written(text: str, file: Path) -> None:
    with pytest.raises(CheckpointError, match="tokenizer"):
        write_gguf(file, CONFIG, tiny_files.tensors(), tokenizer_json=text)
    assert not list(file.parent.iterdir())


def test_a_tokenizer_of_another_model_is_not_written(file: Path) -> None:
    text = tiny_files.tokenizer().to_str()
    small = {n: t[:100] if "embed" in n else t for n, t in tiny_files.tensors().items()}
    with pytest.raises(CheckpointError, match="vocabulary of 100"):
        write_gguf(file, CONFIG | {"vocab_size": 100}, small, tokenizer_json=text)


@pytest.mark.parametrize(
    "changes",
    [{"expand": 3}, {"use_bias": True}, {"use_conv_bias": False}, {"hidden_act": "gelu"}],
)
def test_what_llama_cpp_cannot_express_is_refused(changes: dict[str, Any], file: Path) -> None:
    with pytest.raises(ConfigError, match="expand=2") as caught:
        write_gguf(file, CONFIG | changes, {})
    assert next(iter(changes)) in one_line(caught.value)


@pytest.mark.parametrize("number", [1e5, np.inf, np.nan])
def test_numbers_that_float16_cannot_hold_are_refused(number: float, file: Path) -> None:
    tensors = tiny_files.tensors()
    tensors[IN_PROJ][2, 3] = number
    with pytest.raises((ConfigError, CheckpointError), match=IN_PROJ):
        write_gguf(file, CONFIG, tensors, "f16")
    assert not file.exists()
    if np.isfinite(number):
        write_gguf(file, CONFIG, tensors, "bf16")
        return
    with pytest.raises(CheckpointError, match="NaN or infinity"):  # in no type is it of use
        write_gguf(file, CONFIG, tensors, "bf16")


def test_wrong_weights_are_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match="q8_0"):
        write_gguf(file, CONFIG, tiny_files.tensors(), "int8")


# Dependencies


def test_plain_types_and_kept_blocks_need_no_package(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf_files.write(file, "Q8_0")
    plain = gguf_files.write(file.with_name("plain.gguf"), "F16")
    monkeypatch.setitem(sys.modules, "gguf", None)
    dict(read_gguf(file, keep_blocks=True).tensors)
    dict(read_gguf(plain).tensors)
    with pytest.raises(MissingDependencyError, match=r"anymamba\[gguf\]"):
        dict(read_gguf(file).tensors)
    with pytest.raises(MissingDependencyError, match=r"anymamba\[gguf\]"):
        write_gguf(file, CONFIG, tiny_files.tensors())


def test_torch_is_not_imported(file: Path) -> None:
    gguf_files.write(file, "Q8_0")
    program = (
        "import sys\n"
        "from anymamba.runtime.weights.gguf import load_gguf_weights\n"
        "load_gguf_weights(sys.argv[1])\n"
        "assert 'gguf' not in sys.modules\n"
        "load_gguf_weights(sys.argv[1], 'f32')\n"
        "from anymamba.runtime.convert.conversion import convert\n"
        "convert(sys.argv[1], sys.argv[1] + '.folder')\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])\n"
    )
    command = [sys.executable, "-c", program, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "name", [*expected_shapes(CONFIG), "lm_head.weight", "backbone.layers.10.mixer.D"]
)
def test_names_there_and_back(name: str) -> None:
    assert from_gguf_name(to_gguf_name(name)) == name


@pytest.mark.parametrize(
    "name", ["blk.٣.ssm_d", "blk.+3.ssm_d", "blk.03.ssm_d", "blk..ssm_d", "blk.3", "", "blk.0.D"]
)
def test_other_spellings_are_other_names(name: str) -> None:
    assert from_gguf_name(name) == name
