"""Tensors and configs of GGUF files, against the `gguf` package's own reader and scalar loops."""

import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anymamba.checkpoint import expected_shapes
from anymamba.checkpoint.gguf.names import from_gguf_name, to_gguf_name
from anymamba.checkpoint.gguf.reader import read_gguf
from anymamba.checkpoint.gguf.writer import write_gguf
from anymamba.checkpoint.quantization import QuantizedArray
from anymamba.errors import CheckpointError, ConfigError, MissingDependencyError
from anymamba.runtime.weights.gguf import load_gguf_weights
from tests.support import files, gguf_files, processes
from tests.support.files import CONFIG, TEXT
from tests.support.gguf_files import by_the_package, lists_of, widened

gguf = pytest.importorskip("gguf")
IN_PROJ = "backbone.layers.1.mixer.in_proj.weight"
KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_reads_what_the_package_reads(kind: str, tied: bool, file: Path) -> None:
    gguf_files.write(file, kind, gguf_files.stored_tensors(tied))
    model, theirs = read_gguf(file), by_the_package(file)
    assert list(model.tensors) == list(files.tensors(tied))
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
    ours, expected = read_gguf(file).tensors[name], files.tensors()[name]
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
    assert weights.weight_type == kind
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
    folder = files.write_folder(file.parent / "folder", exact)
    expected, ids = load(folder), [5, 0, 319, 7, 7, 100]
    largest = np.abs(expected.logits(ids)).max()
    # Blocks round activations to 8 bits too; else this is the figure for whole models.
    tolerance = {"Q8_0": 2e-2, "Q4_0": 2e-2, "BF16": 2e-2}.get(kind, 1e-4)
    assert np.abs(load(file).logits(ids) - expected.logits(ids)).max() < tolerance * largest
    assert load(file).weight_type == {"Q8_0": "int8", "Q4_0": "int4"}.get(kind, kind.lower())
    assert np.abs(load(file, "f32").logits(ids) - expected.logits(ids)).max() < 1e-4 * largest


def test_the_engine_takes_the_files_tokenizer(file: Path) -> None:
    pytest.importorskip("anymamba._core")
    from anymamba.runtime.loading import load

    tokenizer = files.tokenizer()
    changes = lists_of(tokenizer) | {"tokenizer__ggml__eos_token_id": 9}
    engine = load(gguf_files.write(file, **changes))
    assert engine.tokenize(TEXT) == tokenizer.encode(TEXT).ids
    assert engine.end_ids == (9,)
    gguf_files.write(file, **changes | {"tokenizer__ggml__model": "t5"})
    with pytest.raises(CheckpointError, match="'t5'"):
        load(file)
    named = file.with_name("tokenizer.json")
    named.write_text(tokenizer.to_str(), encoding="utf-8")
    assert load(file, tokenizer=named).tokenize(TEXT) == tokenizer.encode(TEXT).ids


def test_weights_are_not_rounded_twice(file: Path) -> None:
    with pytest.raises(ConfigError, match="int4"):
        load_gguf_weights(gguf_files.write(file, "Q4_0"), "int8")


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
        write_gguf(file, CONFIG, files.tensors())


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
    done = processes.python("-c", program, file, check=True)
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
