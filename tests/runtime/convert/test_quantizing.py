"""Quantized folders: what they hold, that they are whole or not there, and what is refused."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import anymamba
from anymamba.assets import bundled_model
from anymamba.checkpoint import expected_shapes, open_checkpoint, read_header
from anymamba.checkpoint.dtypes import to_bfloat16, to_float32
from anymamba.checkpoint.quantization import QuantizedArray, dequantize
from anymamba.errors import AnyMambaError, CheckpointError, ConfigError, InputError
from anymamba.runtime.convert.calibration import Recipe, calibrate
from anymamba.runtime.convert.conversion import convert
from anymamba.runtime.convert.quantizing import quantize_checkpoint
from anymamba.runtime.weights.weights import load_weights
from tests.support import files
from tests.support.files import LARGE, entries, peak_memory, types_in, write_small
from tests.support.reference import words

# d 64, e 128: groups of 32 and 64 divide all large matrices, a group of 128 only out_proj.
WIDE = {"hidden_size": 64, "time_step_rank": 4}
SMALL_MATRICES = ("x_proj.weight", "dt_proj.weight")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_small(tmp_path / "source", **WIDE)


def refusal(kind: type[AnyMambaError], *arguments: Any, **options: Any) -> str:
    return files.refusal(kind, quantize_checkpoint, *arguments, **options)


def original(folder: Path) -> dict[str, np.ndarray]:
    return dict(load_weights(open_checkpoint(folder), "f32").tensors)  # type: ignore[arg-type]


def stored(folder: Path) -> dict[str, Any]:
    return dict(load_weights(open_checkpoint(folder)).tensors)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_what_a_folder_holds(tmp_path: Path, weights: str, symmetric: bool, tied: bool) -> None:
    fields = {"tie_word_embeddings": tied, "use_bias": True}
    source = write_small(tmp_path / "source", **WIDE, **fields)
    folder = quantize_checkpoint(source, tmp_path / "out", weights, 32, symmetric)
    assert folder == tmp_path / "out"
    expected = {}
    for name in expected_shapes(json.loads((source / "config.json").read_text())):
        if name.endswith(LARGE):
            parts = {f"{name}_q": "U8", f"{name}_scales": "BF16", f"{name}_minima": "BF16"}
            expected |= {part: parts[part] for part in list(parts)[: 2 if symmetric else 3]}
        else:
            expected[name] = "BF16" if name.endswith(SMALL_MATRICES) else "F32"
    assert types_in(folder) == expected
    before, recipe = original(source), Recipe(8 if weights == "int8" else 4, 32, symmetric)
    for name, tensor in stored(folder).items():
        if isinstance(tensor, QuantizedArray):
            made = recipe.rounded(before[name], name)
            np.testing.assert_array_equal(dequantize(tensor), dequantize(made))
        elif name.endswith(SMALL_MATRICES):
            np.testing.assert_array_equal(tensor, to_bfloat16(before[name]))
        else:
            np.testing.assert_array_equal(tensor, before[name])


def test_its_config(source: Path, tmp_path: Path) -> None:
    folder = quantize_checkpoint(source, tmp_path / "out", group=64, symmetric=False)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == {
        "format": "anymamba",
        "format_version": 1,
        "bits": 4,
        "group_size": 64,
        "symmetric": False,
        "range_search": True,
        "calibrated": False,
    }
    assert config["model_type"] == "mamba"
    assert config["architectures"] == ["MambaForCausalLM"]
    assert config["hidden_size"] == 64


@pytest.mark.parametrize("layout", ["transformers", "original", "minimal"])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_every_layout_and_type_is_read(tmp_path: Path, layout: str, dtype: str) -> None:
    source = convert(files.write_folder(tmp_path / "plain"), tmp_path / "source", layout, dtype)
    folder = quantize_checkpoint(source, tmp_path / "out", "int8", 32)
    before, after = original(source), stored(folder)
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        wide = dequantize(tensor) if isinstance(tensor, QuantizedArray) else tensor
        wide = to_float32(wide) if wide.dtype == np.uint16 else wide
        # An 8-bit step is 1/127 of a group's largest; bfloat16 rounds by 2^-9 of each number.
        assert np.abs(wide - before[name]).max() <= np.abs(before[name]).max() / 127
    companions = {path.name for path in source.iterdir()} - {"model.safetensors", "config.json"}
    for name in companions:
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    assert {path.name for path in folder.iterdir()} == companions | {
        "model.safetensors",
        "config.json",
    }


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_it_predicts_what_the_model_does(tmp_path: Path, weights: str) -> None:
    folder = quantize_checkpoint(bundled_model(), tmp_path / "out", weights)
    engine, whole = anymamba.load(folder), anymamba.load(weights="f32")
    assert engine.weight_type == weights
    text = whole.generate("ROMEO:\n", 400, temperature=0.8, seed=1).text
    losses = [one.score(text).nats / 400 for one in (engine, whole)]
    # A few times what docs/quantization.md measures on a long text, for this one is short.
    assert abs(losses[0] - losses[1]) < (0.003 if weights == "int8" else 0.03)


def test_rows_that_the_group_does_not_divide_stay_bfloat16(source: Path, tmp_path: Path) -> None:
    types = types_in(quantize_checkpoint(source, tmp_path / "out"))  # groups of 128
    assert types["backbone.embeddings.weight"] == "BF16"
    assert types["backbone.layers.0.mixer.in_proj.weight"] == "BF16"
    assert types["backbone.layers.0.mixer.out_proj.weight_q"] == "U8"
    assert anymamba.load(tmp_path / "out").logits([1, 2]).shape == (2, 61)


def test_without_a_search_it_is_what_loading_quantizes(tmp_path: Path) -> None:
    folder = quantize_checkpoint(bundled_model(), tmp_path / "out", "int4", search=False)
    ids = list(b"Once more")
    np.testing.assert_array_equal(
        anymamba.load(folder).logits(ids), anymamba.load(weights="int4").logits(ids)
    )


@pytest.mark.parametrize("tied", [True, False])
def test_calibrated(tmp_path: Path, tied: bool) -> None:
    source = write_small(tmp_path / "source", **WIDE, tie_word_embeddings=tied)
    ids, progress = words(600), []
    folder = quantize_checkpoint(
        *(source, tmp_path / "out", "int4", 32),
        calibrate=ids,
        progress=lambda *now: progress.append(now),
    )
    config, before, after = open_checkpoint(source).config, original(source), stored(folder)
    assert open_checkpoint(folder).config["quantization_config"]["calibrated"] is True
    rounded = {
        n: to_float32(to_bfloat16(t)) for n, t in before.items() if n.endswith(SMALL_MATRICES)
    }
    windows = np.array([ids[:256], ids[256:512]])
    expected = dict(calibrate((before | rounded).get, config, windows, Recipe(4, 32)))
    assert expected.keys() == {name for name in after if name.endswith(LARGE)}
    for name, made in expected.items():
        np.testing.assert_array_equal(after[name].q, made.q)
    assert progress == [(i + 1, len(after)) for i in range(len(after))]


def test_calibrating_on_text_needs_a_tokenizer(source: Path, tmp_path: Path) -> None:
    assert "without a tokenizer" in refusal(
        CheckpointError, source, tmp_path / "a", group=32, calibrate="To be"
    )
    tiny = files.write_folder(tmp_path / "tiny")
    own = quantize_checkpoint(tiny, tmp_path / "own", group=32, calibrate=files.TEXT)
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare" / name).write_bytes((tiny / name).read_bytes())
    given = quantize_checkpoint(
        *(tmp_path / "bare", tmp_path / "given"),
        group=32,
        calibrate=files.TEXT,
        tokenizer=tiny,
        threads=1,
    )
    name = "model.safetensors"
    assert (own / name).read_bytes() == (given / name).read_bytes()
    assert entries(given) == ["config.json", "model.safetensors"]


def test_settings_and_texts_that_are_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "int8 or int4, got 'int3'" in refusal(ConfigError, source, out, "int3")
    assert "32, 64, 128, got 16" in refusal(ConfigError, source, out, group=16)
    options = {"group": 32}
    for empty in ("", []):
        kind = CheckpointError if empty == "" else InputError
        assert refusal(kind, source, out, calibrate=empty, **options)
    assert "token 61" in refusal(InputError, source, out, calibrate=[1, 61], **options)
    assert "list of tokens" in refusal(InputError, source, out, calibrate=[0.5], **options)
    assert entries(tmp_path) == ["source"]


def test_weights_that_no_scale_fits_are_named(tmp_path: Path) -> None:
    source = write_small(tmp_path / "source", **WIDE)
    tensors = original(source)
    name = "backbone.layers.1.mixer.out_proj.weight"
    tensors[name] = np.full_like(tensors[name], np.inf)
    save_file(tensors, source / "model.safetensors")
    for options in ({}, {"calibrate": words(300)}):
        message = refusal(CheckpointError, source, tmp_path / "out", group=32, **options)
        assert f"{name} holds NaN" in message
    assert entries(tmp_path) == ["source"]


def test_what_is_quantized_already_is_refused(source: Path, tmp_path: Path) -> None:
    once = quantize_checkpoint(source, tmp_path / "once", group=32)
    assert "are quantized" in refusal(CheckpointError, once, tmp_path / "twice", "int8", 32)


def test_destinations_that_are_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    assert "exists" in refusal(CheckpointError, source, tmp_path / "there", group=32)
    for place in (source, tmp_path):
        message = refusal(ConfigError, source, place, group=32, overwrite=True)
        assert "would replace the source" in message
    assert "does not exist" in refusal(CheckpointError, source, tmp_path / "no" / "out", group=32)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("dear")
    message = refusal(CheckpointError, source, tmp_path / "out", group=32, overwrite=True)
    assert "diary.txt" in message
    assert entries(tmp_path / "out") == ["diary.txt"]


def test_overwriting(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "out", "int8", 32)
    folder = quantize_checkpoint(source, tmp_path / "out", "int4", 32, overwrite=True)
    assert anymamba.load(folder).weight_type == "int4"
    assert entries(tmp_path) == ["out", "source"]


KILLED = """
import os, signal, sys
from anymamba.runtime.convert.quantizing import quantize_checkpoint

def die(done, total):
    if done == total // 2:
        os.kill(os.getpid(), signal.SIGKILL)

source, out, overwrite = sys.argv[1:]
quantize_checkpoint(source, out, "int4", 32, overwrite=bool(overwrite), progress=die)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no SIGKILL")
@pytest.mark.parametrize("before", [False, True])
def test_a_killed_process_leaves_no_half_folder(source: Path, tmp_path: Path, before: bool) -> None:
    out = tmp_path / "out"
    if before:
        quantize_checkpoint(source, out, "int8", 32)
        old = (out / "model.safetensors").read_bytes()
    command = [sys.executable, "-c", KILLED, str(source), str(out), "yes" if before else ""]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    visible = [name for name in entries(tmp_path) if not name.startswith(".")]
    assert visible == (["out", "source"] if before else ["source"])
    if before:
        assert (out / "model.safetensors").read_bytes() == old
    folder = quantize_checkpoint(source, out, "int4", 32, overwrite=before)
    assert anymamba.load(folder).weight_type == "int4"


def test_a_failure_in_the_middle_cleans_up(source: Path, tmp_path: Path) -> None:
    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, tmp_path / "out", "int4", 32, progress=fail)
    assert entries(tmp_path) == ["source"]


def test_memory_holds_the_largest_tensor_and_not_the_model(large: Path, tmp_path: Path) -> None:
    # The largest has 1 MB; beside it there are blocks of 131,072 numbers that are worked on. Before
    # that, config.json is read with room for 8 MB.
    assert peak_memory(quantize_checkpoint, large, tmp_path / "out") < 10e6


def test_what_is_mapped_is_aligned(source: Path, tmp_path: Path) -> None:
    folder = quantize_checkpoint(source, tmp_path / "out", group=32)
    records = read_header(folder / "model.safetensors").tensors.values()
    aligned = [record for record in records if (record.end - record.begin) % 64 == 0]
    assert len(aligned) > len(records) / 2
    assert all(record.begin % 64 == 0 for record in aligned)
