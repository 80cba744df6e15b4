"""Every type of tensors in GGUF files, and models in several files, against the `gguf` package."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anymamba.checkpoint import TensorRecord
from anymamba.checkpoint.gguf.blocks import KEPT, PLAIN, TYPES, kept_blocks, widened
from anymamba.checkpoint.gguf.files import find_gguf
from anymamba.checkpoint.gguf.reader import read_gguf
from anymamba.checkpoint.quantization import QuantizedArray, dequantize
from anymamba.errors import CheckpointError, ConfigError, MissingDependencyError
from anymamba.runtime.convert.conversion import convert
from anymamba.runtime.convert.quantizing import quantize_checkpoint
from anymamba.runtime.weights.gguf import load_gguf_weights
from tests.support import files, gguf_files
from tests.support.files import one_line

gguf = pytest.importorskip("gguf")

BLOCKS = [found.name for found in TYPES.values() if found.name not in PLAIN]
EMBEDDINGS = "backbone.embeddings.weight"
OUT_PROJ = "backbone.layers.0.mixer.out_proj.weight"
IDS = [5, 0, 63, 7, 7, 40]


def by_the_package(blocks: Any, kind: str) -> Any:
    return gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])


@pytest.mark.parametrize("kind", BLOCKS)
def test_values_are_those_of_the_package(kind: str) -> None:
    rows = gguf_files.blocks(kind, (40, 512), np.random.default_rng(1))
    found = widened(kind, memoryview(rows.tobytes()), (40, 512))
    assert found.dtype == np.float32
    assert np.array_equal(found, by_the_package(rows, kind))


def test_numbers_that_are_none_come_through(recwarn: pytest.WarningsRecorder) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (64, 210), np.uint8)
    rows[:8, 208:] = np.float16([np.inf]).view(np.uint8)
    rows[8:16, 208:] = np.float16([np.nan]).view(np.uint8)
    found = widened("Q6_K", memoryview(rows.tobytes()), (64, 256))
    assert not recwarn.list
    with np.errstate(all="ignore"):
        assert np.array_equal(found, by_the_package(rows, "Q6_K"), equal_nan=True)


@pytest.mark.parametrize("kind", KEPT)
def test_kept_blocks_stand_for_the_same_values(kind: str) -> None:
    rows = gguf_files.blocks(kind, (24, 512), np.random.default_rng(2))
    if kind == "Q8_0":
        rows.reshape(-1, 34)[:, 2:][rows.reshape(-1, 34)[:, 2:] == 0x80] = 0x81
    record = TensorRecord(Path("a.gguf"), "x", kind, (24, 512), 0, rows.nbytes)
    kept = kept_blocks(record, memoryview(rows.tobytes()))
    assert (kept.bits, kept.group, kept.symmetric) == (KEPT[kind], 32, kind in ("Q8_0", "Q4_0"))
    exact, values = by_the_package(rows, kind), dequantize(kept)
    # Scale and minimum are each rounded to the 8 bits of bfloat16, and the sum to float32.
    largest = np.abs(exact)
    if not kept.symmetric:
        minima = np.repeat(kept.minima.astype(np.uint32) << 16, 32, axis=1).view(np.float32)
        largest = np.abs(exact - minima) + np.abs(minima)
    assert (np.abs(values - exact) <= (2**-8 + 2**-16) * largest).all()
    assert (values != exact).any()


@pytest.mark.parametrize(
    ("kind", "used"),
    [("Q4_1", "int4"), ("Q4_K", "int4"), ("Q6_K", "int8"), ("Q2_K", "int8"), ("IQ4_NL", "int8")],
)
def test_the_engine_says_what_the_values_say(kind: str, used: str, file: Path) -> None:
    pytest.importorskip("anymamba._core")
    from anymamba.runtime.loading import load

    gguf_files.write_wide(file, kind)
    folder = convert(file, file.parent / "folder", weights="f32")
    expected = load(folder).logits(IDS)
    largest = np.abs(expected).max()
    engine = load(file)
    assert engine.weight_type == used
    # As for Q8_0 and Q4_0: activations are rounded to 8 bits. What 8 bits take of a weight beside
    # that, 1/254 of its group's largest, is less.
    assert np.abs(engine.logits(IDS) - expected).max() < 2e-2 * largest
    assert np.abs(load(file, "f32").logits(IDS) - expected).max() < 1e-4 * largest
    assert (engine.weights.remark is None) == (kind in KEPT)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q5_K"])
def test_what_llama_quantize_writes_opens_without_the_package(
    kind: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps the head in Q6_K. Of the rest, Q5_K needs the package."""
    gguf_files.write_wide(file, kind, head="Q6_K")
    monkeypatch.setitem(sys.modules, "gguf", None)
    if kind == "Q5_K":
        with pytest.raises(MissingDependencyError, match=r"Q5_K.*anymamba\[gguf\]"):
            load_gguf_weights(file)
        return
    weights, _ = load_gguf_weights(file)
    table, projection = weights.tensors[EMBEDDINGS], weights.tensors[OUT_PROJ]
    assert isinstance(table, QuantizedArray)
    assert isinstance(projection, QuantizedArray)
    assert (weights.weight_type, table.bits, projection.bits) == ("int4", 8, 4)
    assert weights.remark is not None
    assert "(1 in Q6_K)" in weights.remark


@pytest.mark.parametrize("asked", ["f32", "bf16", "int8", "int4"])
def test_other_types_become_what_is_asked(asked: str, file: Path) -> None:
    gguf_files.write_wide(file, "Q6_K")
    weights, _ = load_gguf_weights(file, asked)
    projection = weights.tensors[OUT_PROJ]
    kind = f"int{projection.bits}" if isinstance(projection, QuantizedArray) else projection.dtype
    assert kind == {"f32": np.float32, "bf16": np.uint16}.get(asked, asked)
    assert (weights.remark is None) == (asked in ("f32", "bf16"))


def test_one_tensor_at_a_time_is_widened(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that fits in 8 bits may not fit in float32."""
    import tracemalloc

    gguf_files.write_wide(file, "Q6_K")
    model = read_gguf(file)
    largest = 4 * max(np.prod(record.shape) for record in model.tensors.records.values())
    tracemalloc.start()
    weights, _ = load_gguf_weights(file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The largest in float32, what it becomes, and the blocks that are worked on: 1 MB.
    assert peak < weights.nbytes + 1.5 * largest + (2 << 20)


def test_converting_is_exact_and_names_what_is_not_written(file: Path) -> None:
    gguf_files.write_wide(file, "Q5_K", head="Q6_K")
    folder = convert(file, file.parent / "folder")
    stored = {t.name: t for t in gguf.GGUFReader(file).tensors}
    from safetensors.numpy import load_file

    found = load_file(folder / "model.safetensors")
    for name, theirs in ((EMBEDDINGS, "token_embd.weight"), (OUT_PROJ, "blk.0.ssm_out.weight")):
        expected = by_the_package(stored[theirs].data, stored[theirs].tensor_type.name)
        assert np.array_equal(found[name], expected)
    with pytest.raises(ConfigError, match="Q6_K") as caught:
        convert(file, file.with_name("again.gguf"), "gguf")
    assert "--weights" in one_line(caught.value)
    convert(file, file.with_name("again.gguf"), "gguf", "q8_0")


def test_weights_are_not_rounded_twice_whatever_the_table_is(file: Path) -> None:
    stored = gguf_files.stored_tensors()
    gguf_files.write(file, "Q4_0", stored)
    mixed = gguf_files.write_wide(file, "Q4_0", head="Q6_K")
    with pytest.raises(CheckpointError, match="Q4_0, Q6_K"):
        quantize_checkpoint(mixed, file.parent / "int4")


# Several files


def write_parts(folder: Path, name: str = "model.gguf") -> list[Path]:
    folder.mkdir(exist_ok=True)
    gguf_files.write_wide(folder / name, "Q4_0", head="Q6_K", parts=4)
    return sorted(folder.iterdir())


def test_any_part_stands_for_all(file: Path, tmp_path: Path) -> None:
    whole, _ = load_gguf_weights(gguf_files.write_wide(file, "Q4_0", head="Q6_K"))
    parts = write_parts(tmp_path / "parts")
    assert [part.name for part in parts] == [f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for part in parts:
        weights, _ = load_gguf_weights(part)
        assert weights.config == whole.config
        assert weights.digest() == whole.digest()
        weights.check()
    assert find_gguf(tmp_path / "parts") == parts[0]


def test_parts_that_do_not_belong_together_are_named(tmp_path: Path) -> None:
    refusal = partial(files.refusal, CheckpointError, read_gguf)
    parts = write_parts(tmp_path / "parts")
    second = parts[1].read_bytes()
    parts[1].unlink()
    assert "missing 'model-00002-of-00003.gguf'" in refusal(parts[0])
    parts[1].write_bytes(parts[2].read_bytes())
    assert "part 2" in refusal(parts[0])
    parts[1].write_bytes(second)
    parts[0].rename(tmp_path / "parts" / "mine.gguf")
    assert "model-00001-of-00003.gguf" in refusal(tmp_path / "parts" / "mine.gguf")
    other = gguf_files.write(tmp_path / "parts" / parts[0].name, "F32")
    assert "'blk" in refusal(parts[1]) or "part None" in refusal(parts[1])
    assert other.is_file()


@pytest.mark.parametrize(
    ("count", "word"), [(-1, "parts"), (2**31, "parts"), ("3", "parts"), (2.0, "parts")]
)
def test_a_count_that_makes_no_sense(count: Any, word: str, tmp_path: Path) -> None:
    file = tmp_path / "m-00001-of-00002.gguf"
    values = {"split__count": abs(count) if isinstance(count, int) else count}
    gguf_files.write(file, **values)
    if count == -1:
        read_gguf(file)  # 1 part
        return
    with pytest.raises(CheckpointError, match=word):
        read_gguf(file)


# Folders


def test_a_folder_with_one_model(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    assert find_gguf(folder) is None
    file = gguf_files.write(folder / "tiny.Q8_0.gguf", "Q8_0")
    (folder / "mmproj-tiny-f16.gguf").write_bytes(b"GGUF")
    (folder / "tiny.imatrix.gguf").write_bytes(b"GGUF")
    (folder / "README.md").write_text("")
    assert find_gguf(folder) == file
    (folder / "tiny.Q4_0.gguf").write_bytes(b"GGUF")
    message = files.refusal(CheckpointError, find_gguf, folder)
    assert "'tiny.Q4_0.gguf', 'tiny.Q8_0.gguf'" in message


def test_other_weights_go_first(tmp_path: Path) -> None:
    folder = files.write_folder(tmp_path / "model")
    for name in ("a.gguf", "b.gguf"):
        (folder / name).write_bytes(b"GGUF")
    assert find_gguf(folder) is None


def test_everything_that_reads_a_model_takes_such_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("anymamba._core")
    from anymamba.cli.main import main

    folder = tmp_path / "model"
    folder.mkdir()
    gguf_files.write_wide(folder / "m.gguf", "Q4_0", head="Q6_K", parts=5)
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "tokenizer.json").write_text(files.tokenizer().to_str())
    assert main(["info", str(folder), "--json"]) == 0
    assert '"Q6_K": 16384' in capsys.readouterr().out
    assert main(["convert", str(folder), str(tmp_path / "new")]) == 0
    capsys.readouterr()
    prompt = ["", "--max-new-tokens", "1", "--tokenizer", str(tmp_path / "t")]
    assert main(["generate", *prompt, "--model", str(folder)]) == 0
    told = capsys.readouterr().err.splitlines()
    assert len([line for line in told if "1 in Q6_K" in line]) == 1
