"""Mamba-2 in GGUF, beside llama.cpp and the `gguf` package."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from anymamba.checkpoint import expected_shapes
from anymamba.checkpoint.gguf.header import read_gguf_header
from anymamba.checkpoint.gguf.names import to_gguf_name
from anymamba.checkpoint.gguf.reader import read_gguf
from anymamba.checkpoint.gguf.writer import GGUF_WEIGHTS, write_gguf
from anymamba.errors import CheckpointError, ConfigError
from anymamba.modeling.auto import load_causal_lm
from anymamba.runtime.convert import convert
from tests.support.files import one_line
from tests.support.gguf_files import add, by_the_package, refusal, widened
from tests.support.tolerance import assert_same

gguf = pytest.importorskip("gguf")

# No two sizes alike but those that blocks of 32 ask for: d 32, e 64, h 4, p 16, g 2, n 5, k 4.
CONFIG: dict[str, Any] = {
    "model_type": "mamba2",
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 4,
    "head_dim": 16,
    "n_groups": 2,
    "state_size": 5,
    "expand": 2,
    "conv_kernel": 4,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
}
COUNTS = {
    "mamba2.embedding_length": 32,
    "mamba2.block_count": 2,
    "mamba2.ssm.conv_kernel": 4,
    "mamba2.ssm.inner_size": 64,
    "mamba2.ssm.state_size": 5,
    "mamba2.ssm.time_step_rank": 4,
    "mamba2.ssm.group_count": 2,
}
EPSILON = "mamba2.attention.layer_norm_rms_epsilon"
IDS = [int(token) for token in np.random.default_rng(1).integers(0, 97, 40)]


def random_weights(config: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    shapes = expected_shapes(config)
    return {n: (0.3 * rng.standard_normal(s)).astype(np.float32) for n, s in shapes.items()}


def stored_tensors() -> dict[str, NDArray[Any]]:
    """The weights as llama.cpp's converter names and shapes them."""
    ours = random_weights(CONFIG)
    stored = {
        "token_embd.weight": ours["backbone.embeddings.weight"],
        "output_norm.weight": ours["backbone.norm_f.weight"],
        "output.weight": ours["lm_head.weight"],
    }
    for layer in (0, 1):
        old, new = f"backbone.layers.{layer}.", f"blk.{layer}."
        stored |= {
            new + "attn_norm.weight": ours[old + "norm.weight"],
            new + "ssm_in.weight": ours[old + "mixer.in_proj.weight"],
            new + "ssm_conv1d.weight": ours[old + "mixer.conv1d.weight"].squeeze(),
            new + "ssm_conv1d.bias": ours[old + "mixer.conv1d.bias"],
            new + "ssm_dt.bias": ours[old + "mixer.dt_bias"],
            new + "ssm_a": -np.exp(ours[old + "mixer.A_log"]).reshape(4, 1),
            new + "ssm_d": ours[old + "mixer.D"].reshape(4, 1),
            new + "ssm_norm.weight": ours[old + "mixer.norm.weight"].reshape(2, 32),
            new + "ssm_out.weight": ours[old + "mixer.out_proj.weight"],
        }
    return stored


def write(path: Path, stored: dict[str, NDArray[Any]] | None = None, **changes: Any) -> Path:
    """A file as the `gguf` package writes it; values of its header with dots spelt as __."""
    values: dict[str, Any] = {**COUNTS, EPSILON: 1e-5}
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    writer = gguf.GGUFWriter(path, arch="mamba2")
    for name, value in values.items():
        add(writer, name, value)
    for name, value in (stored_tensors() if stored is None else stored).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@torch.no_grad()
def logits_of(place: Path) -> NDArray[np.float32]:
    return load_causal_lm(place, dtype=torch.float32)(torch.tensor([IDS])).logits[0].numpy()


def test_reads_what_llama_cpp_s_converter_writes(file: Path) -> None:
    model, expected = read_gguf(write(file)), random_weights(CONFIG)
    assert CONFIG.items() <= model.config.items()
    assert list(model.tensors) == list(expected)
    for name, tensor in model.tensors.items():
        # Of A_log its exponential is rounded, and then its logarithm.
        atol = 2**-23 if name.endswith("A_log") else 0.0
        np.testing.assert_allclose(tensor, expected[name], rtol=0, atol=atol, strict=True)


@pytest.mark.parametrize("weights", GGUF_WEIGHTS)
def test_writes_and_reads_what_the_package_reads(weights: str, file: Path) -> None:
    write_gguf(file, CONFIG, random_weights(CONFIG), weights)
    theirs, stored = by_the_package(file), stored_tensors()
    assert theirs.keys() == stored.keys()
    assert {name: tensor.shape for name, tensor in theirs.items()} == {
        name: tensor.shape for name, tensor in stored.items()
    }
    header = read_gguf_header(file)
    assert header.metadata.items() >= COUNTS.items()
    kinds = {record.dtype for n, record in header.tensors.items() if n.endswith("in.weight")}
    assert kinds == {weights.upper()}
    for name, ours in read_gguf(file).tensors.items():
        expected = theirs[to_gguf_name(name)]
        if name.endswith("A_log"):
            expected = np.log(-expected)
        np.testing.assert_allclose(widened(ours), expected.reshape(ours.shape), rtol=2e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "num_hidden_layers": 1},
        {"num_heads": 1, "head_dim": 64, "n_groups": 1, "state_size": 16},
        {"num_heads": 64, "head_dim": 1, "n_groups": 4, "conv_kernel": 2},
        {"hidden_size": 33, "num_heads": 6, "head_dim": 11, "n_groups": 6},
        {"expand": 3, "num_heads": 6, "n_groups": 3, "state_size": 64},
        {"layer_norm_epsilon": 0.125},
    ],
)
def test_llama_cpp_computes_the_same(changes: dict[str, Any], file: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    config = CONFIG | changes
    write_gguf(file, config, random_weights(config))
    one = {"n_threads": 1, "n_threads_batch": 1}
    llama = llama_cpp.Llama(str(file), logits_all=True, n_ctx=64, verbose=False, **one)
    llama.eval(IDS)
    assert_same(logits_of(file), np.array(llama.scores[: len(IDS)]))


def test_what_llama_cpp_rewrites_is_read(tmp_path: Path, file: Path) -> None:
    """Its programs leave out the 1s that a shape begins with."""
    llama_cpp = pytest.importorskip("llama_cpp")
    config = CONFIG | {"n_groups": 1, "num_heads": 1, "head_dim": 64}
    write_gguf(file, config, random_weights(config))
    rewritten = tmp_path / "q8.gguf"
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, 1
    done = llama_cpp.llama_model_quantize(str(file).encode(), str(rewritten).encode(), parameters)
    assert done == 0
    assert read_gguf_header(rewritten).tensors["blk.0.ssm_norm.weight"].shape == (64,)
    found = read_gguf(rewritten).tensors
    assert {name: found[name].shape for name in found} == expected_shapes(config)
    expected = by_the_package(rewritten)["blk.1.ssm_in.weight"]
    assert np.array_equal(found["backbone.layers.1.mixer.in_proj.weight"], expected)


@pytest.mark.parametrize("weights", GGUF_WEIGHTS)
def test_a_file_becomes_a_folder_and_a_file_again(weights: str, tmp_path: Path, file: Path) -> None:
    write_gguf(file, CONFIG, random_weights(CONFIG), weights)
    folder = convert(file, tmp_path / "folder", "transformers", "f32")
    again = convert(folder, tmp_path / "again.gguf", "gguf", weights)
    assert_same(logits_of(folder), logits_of(file))
    assert_same(logits_of(again), logits_of(file))


@pytest.mark.parametrize(
    "changes",
    [
        {"use_bias": True},
        {"use_conv_bias": False},
        {"hidden_act": "gelu"},
        {"time_step_limit": [0.0, 0.5]},
        {"time_step_limit": (0.001, math.inf)},
    ],
)
def test_what_llama_cpp_cannot_express_is_refused(changes: dict[str, Any], file: Path) -> None:
    with pytest.raises(ConfigError, match="time_step_limit=") as caught:
        write_gguf(file, CONFIG | changes, {})
    assert next(iter(changes)) in one_line(caught.value)
    assert not file.exists()


@pytest.mark.parametrize("name", [*COUNTS, EPSILON])
def test_a_missing_value_is_named(name: str, file: Path) -> None:
    write(file, **{name.replace(".", "__"): None})
    assert name in refusal(file)


@pytest.mark.parametrize("part", ["ssm_norm.weight", "ssm_dt.bias", "ssm_d"])
def test_a_missing_tensor_is_named(part: str, file: Path) -> None:
    stored = stored_tensors()
    del stored[f"blk.1.{part}"]
    write(file, stored)
    ours = {"ssm_norm.weight": "norm.weight", "ssm_dt.bias": "dt_bias", "ssm_d": "D"}[part]
    assert f"missing backbone.layers.1.mixer.{ours}" in refusal(file)


def test_tensors_of_mamba_1_are_named(file: Path) -> None:
    write(file, stored_tensors() | {"blk.0.ssm_x.weight": np.zeros((13, 64), np.float32)})
    assert "unexpected 'blk.0.ssm_x.weight'" in refusal(file)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"mamba2__ssm__inner_size": 63}, "inner_size is 63"),
        ({"mamba2__ssm__time_step_rank": 0}, "time_step_rank, 0"),
        ({"mamba2__ssm__time_step_rank": 3}, "time_step_rank, 3"),
        ({"mamba2__ssm__time_step_rank": 2.0}, "time_step_rank, 2.0"),
        ({"mamba2__ssm__time_step_rank": 8}, "dt_bias is 4, expected 8"),
        ({"mamba2__ssm__group_count": 3}, "n_groups 3 must divide num_heads 4"),
        ({"mamba2__ssm__group_count": 0}, "n_groups"),
        ({"mamba2__ssm__group_count": 2**31}, "n_groups"),
        ({"mamba2__ssm__group_count": 4}, "norm.weight is 2×32, expected 4×16"),
        ({"mamba2__ssm__state_size": "5"}, "state_size"),
        ({"mamba2__block_count": 2**31}, "num_hidden_layers"),
        ({EPSILON.replace(".", "__"): math.nan}, "nan"),
    ],
)
def test_values_that_make_no_sense_are_named(
    changes: dict[str, Any], word: str, file: Path
) -> None:
    write(file, **changes)
    assert word in refusal(file)


@pytest.mark.parametrize("value", [0.5, np.nan, -np.inf])
def test_an_a_that_no_a_log_gives_is_refused(value: float, file: Path) -> None:
    stored = stored_tensors()
    stored["blk.1.ssm_a"][3, 0] = value
    write(file, stored)
    with pytest.raises(CheckpointError, match=r"blk\.1\.ssm_a"):
        dict(read_gguf(file).tensors)
