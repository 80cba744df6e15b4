"""Which weights the core gets: mapped where it can be, converted where asked for, checked."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from anymamba.checkpoint import TensorBytes, checkpoint_digest, open_checkpoint, write_safetensors
from anymamba.checkpoint.dtypes import to_bfloat16, to_float32
from anymamba.checkpoint.quantization import QuantizedArray, dequantize, quantize
from anymamba.errors import CheckpointError, ConfigError
from anymamba.runtime.weights.weights import load_weights
from tests.support import files
from tests.support.files import LARGE, SMALL, small_weights, write_small

SENSITIVE = ("x_proj.weight", "dt_proj.weight")
# Widths that groups of 128 divide: d 128, e 256.
WIDE = {"hidden_size": 128, "num_hidden_layers": 1, "tie_word_embeddings": False}


def write_types(folder: Path, types: dict[str, str], **fields: Any) -> Path:
    """A checkpoint whose tensors that end in a key of `types` are stored so; the rest is F32."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SMALL | fields))
    stored = {}
    for name, tensor in small_weights(**fields).items():
        kind = next((kind for end, kind in types.items() if name.endswith(end)), "F32")
        array = to_bfloat16(tensor) if kind == "BF16" else tensor
        array = tensor.astype({"F16": np.float16, "I32": np.int32}.get(kind, array.dtype))
        array = to_bfloat16(tensor) if kind == "BF16" else array
        stored[name] = TensorBytes(kind, array.shape, array.tobytes())
    write_safetensors(folder / "model.safetensors", stored)
    return folder


def loaded(folder: Path, kind: str = "auto") -> Any:
    return load_weights(open_checkpoint(folder), kind)


@pytest.mark.parametrize(
    ("stored", "dtype", "kind"),
    [("F32", np.float32, "f32"), ("F16", np.float16, "f16"), ("BF16", np.uint16, "bf16")],
)
def test_as_stored_nothing_is_copied(tmp_path: Path, stored: str, dtype: Any, kind: str) -> None:
    weights = loaded(write_types(tmp_path, {"": stored}))
    assert weights.weight_type == kind
    expected = small_weights()
    assert weights.tensors.keys() == expected.keys()
    for name, tensor in weights.tensors.items():
        assert tensor.dtype == dtype
        assert not tensor.flags.writeable  # the file's own bytes
        wide = to_float32(tensor) if stored == "BF16" else tensor
        exact = {"F32": np.float32, "F16": np.float16}.get(stored)
        as_stored = (
            expected[name].astype(exact) if exact else to_float32(to_bfloat16(expected[name]))
        )
        assert (wide == as_stored).all()
    itemsize = np.dtype(dtype).itemsize
    assert weights.n_parameters == sum(tensor.size for tensor in expected.values())
    assert weights.nbytes == itemsize * weights.n_parameters


@pytest.mark.parametrize("stored", ["F32", "F16", "BF16"])
def test_float32(tmp_path: Path, stored: str) -> None:
    weights = loaded(write_types(tmp_path, {"proj.weight": stored}), "f32")
    assert weights.weight_type == "f32"
    assert {tensor.dtype for tensor in weights.tensors.values()} == {np.dtype(np.float32)}
    assert (weights.tensors["backbone.embeddings.weight"].flags.writeable) is False
    assert weights.tensors["backbone.layers.0.mixer.in_proj.weight"].flags.writeable == (
        stored != "F32"
    )


def test_bfloat16_is_for_matrices(tmp_path: Path) -> None:
    weights = loaded(write_types(tmp_path, {"A_log": "F16", "in_proj.weight": "BF16"}), "bf16")
    assert weights.weight_type == "bf16"
    expected = small_weights()
    for name, tensor in weights.tensors.items():
        if name.endswith((*LARGE, *SENSITIVE)):
            assert (tensor == to_bfloat16(expected[name])).all()
        else:
            assert tensor.dtype == (np.float16 if name.endswith("A_log") else np.float32)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("stored", ["F32", "BF16"])
def test_quantized_on_load(tmp_path: Path, bits: int, stored: str) -> None:
    weights = loaded(write_types(tmp_path, {"": stored}, **WIDE), f"int{bits}")
    assert weights.weight_type == f"int{bits}"
    for name, tensor in weights.tensors.items():
        original = small_weights(**WIDE)[name]
        if stored == "BF16":
            original = to_float32(to_bfloat16(original))
        if name.endswith(LARGE):
            again = quantize(original, bits, 128)
            assert (tensor.bits, tensor.group, tensor.shape) == (bits, 128, original.shape)
            assert (tensor.q == again.q).all()
        elif name.endswith(SENSITIVE):
            assert (tensor == to_bfloat16(original)).all()
        else:
            assert tensor.dtype == np.float32
            assert (tensor == original).all()
    assert weights.n_parameters == sum(t.size for t in small_weights(**WIDE).values())


def test_rows_that_no_group_divides_stay_bfloat16(tmp_path: Path) -> None:
    weights = loaded(write_small(tmp_path), "int4")  # d 24, e 48
    assert not any(isinstance(tensor, QuantizedArray) for tensor in weights.tensors.values())
    assert weights.tensors["backbone.embeddings.weight"].dtype == np.uint16


# Quantized folders.


def write_quantized(
    folder: Path, bits: int, symmetric: bool, changes: dict[str, Any] | None = None
) -> Path:
    tensors = {
        name: to_bfloat16(tensor) if name.endswith(SENSITIVE) else tensor
        for name, tensor in small_weights(**WIDE).items()
    }
    config = SMALL | WIDE
    return files.write_quantized(folder, config, tensors, bits, 64, symmetric, changes=changes)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_folder_is_mapped(tmp_path: Path, bits: int, symmetric: bool) -> None:
    folder = write_quantized(tmp_path, bits, symmetric)
    for kind in ("auto", f"int{bits}"):
        weights = loaded(folder, kind)
        assert weights.weight_type == f"int{bits}"
        for name, original in small_weights(**WIDE).items():
            tensor = weights.tensors[name]
            if name.endswith(LARGE):
                expected = quantize(original, bits, 64, symmetric)
                assert (tensor.bits, tensor.group) == (bits, 64)
                assert tensor.symmetric == symmetric
                assert (dequantize(tensor) == dequantize(expected)).all()
                assert not tensor.q.flags.writeable
                assert not tensor.scales.flags.writeable


def test_a_quantized_folder_is_widened_but_not_quantized_again(tmp_path: Path) -> None:
    folder = write_quantized(tmp_path, 8, True)
    name = "backbone.layers.0.mixer.in_proj.weight"
    kept = dequantize(quantize(small_weights(**WIDE)[name], 8, 64))
    assert (loaded(folder, "f32").tensors[name] == kept).all()
    assert (loaded(folder, "bf16").tensors[name] == to_bfloat16(kept)).all()
    with pytest.raises(ConfigError, match="are int8 already and cannot be made int4"):
        loaded(folder, "int4")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quant_method": "gptq"}, "'gptq'.*'anymamba'"),
        ({"quant_method": None}, "quantized by None"),
        ({"format_version": 2}, "format_version 2"),
        ({"bits": 3}, "bits 3, expected 8 or 4"),
        ({"bits": True}, "bits True"),
    ],
)
def test_another_quantization_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    folder = write_quantized(tmp_path, 8, True, changes)
    with pytest.raises(CheckpointError, match=reason) as caught:
        loaded(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("part", "shape", "reason"),
    [
        ("weight_q", (512, 100), "in_proj.weight_q is 512×100"),
        ("weight_scales", (512, 3), "in_proj.weight_scales is 512×3"),
        ("weight_scales", (512, 0), "in_proj.weight_scales is 512×0"),
        ("weight_minima", (512, 2), "in_proj.weight_minima is 512×2, expected 512×1"),
        ("weight_q", None, "missing .*in_proj.weight_q"),
        ("weight_scales", None, "missing .*in_proj.weight_scales"),
        ("x_proj.weight_q", (13, 256), "unexpected .*x_proj.weight_q"),
    ],
)
def test_crooked_parts_are_refused(
    tmp_path: Path, part: str, shape: tuple[int, ...] | None, reason: str
) -> None:
    write_quantized(tmp_path, 8, True)
    prefix = "backbone.layers.0.mixer."
    name = prefix + (part if "proj" in part else f"in_proj.{part}")
    stored = {}
    for own, record in open_checkpoint(tmp_path).tensors.items():
        data = record.file.read_bytes()[record.begin : record.end]
        stored[own] = TensorBytes(record.dtype, record.shape, data)
    if part == "weight_minima":  # of groups other than the scales'
        scales = (512, 1)
        stored[f"{prefix}in_proj.weight_scales"] = TensorBytes("BF16", scales, bytes(2 * 512))
    if shape is None:
        del stored[name]
    else:
        kind, size = ("U8", 1) if part.endswith("_q") else ("BF16", 2)
        stored[name] = TensorBytes(kind, shape, bytes(size * shape[0] * shape[1]))
    write_safetensors(tmp_path / "model.safetensors", stored)
    with pytest.raises(CheckpointError, match=reason):
        loaded(tmp_path)


# What is refused.


def test_pickles_name_the_command_that_converts_them(tmp_path: Path) -> None:
    write_small(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"anymamba convert .* DST.*anymamba\[torch\]"):
        loaded(tmp_path)


def test_no_such_type(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"mixer\.D in .* stored as I32.*F32 or F16 or BF16"):
        loaded(write_types(tmp_path, {"0.mixer.D": "I32"}))


def test_tensors_that_do_not_fit_the_config(tmp_path: Path) -> None:
    write_small(tmp_path)
    config = SMALL | {"vocab_size": 62, "use_bias": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"missing .*in_proj.bias.*61×24, expected 62×24"):
        loaded(tmp_path)


@pytest.mark.parametrize("differs", [False, True])
def test_a_tied_model_may_repeat_its_table(tmp_path: Path, differs: bool) -> None:
    write_small(tmp_path)
    tensors = small_weights()
    tensors["lm_head.weight"] = tensors["backbone.embeddings.weight"].copy()
    tensors["lm_head.weight"][-1, -1] += differs
    save_file(tensors, tmp_path / "model.safetensors")
    if differs:
        with pytest.raises(CheckpointError, match="ties lm_head"):
            loaded(tmp_path)
    else:
        assert loaded(tmp_path).tensors.keys() == small_weights().keys()


def test_the_digest_is_that_of_the_files_whatever_the_kind(tmp_path: Path) -> None:
    write_types(tmp_path, {"": "BF16"}, **WIDE)
    expected = checkpoint_digest(open_checkpoint(tmp_path))
    for kind in ("auto", "f32", "int8"):
        assert loaded(tmp_path, kind).digest() == expected


def test_the_digest_is_of_what_was_mapped(tmp_path: Path) -> None:
    """Also where the file was replaced since."""
    weights = loaded(write_small(tmp_path))
    before = checkpoint_digest(open_checkpoint(tmp_path))
    save_file(small_weights(seed=1), tmp_path / "new.safetensors")
    (tmp_path / "new.safetensors").replace(tmp_path / "model.safetensors")
    assert weights.digest() == before != loaded(tmp_path).digest()


def test_a_file_that_is_replaced_while_it_is_opened(tmp_path: Path) -> None:
    """By one in which the numbers lie elsewhere: what was read of the old one does not hold."""
    opened = open_checkpoint(write_small(tmp_path))
    write_small(tmp_path, dtype=np.float16)
    with pytest.raises(CheckpointError, match="was replaced while it was opened"):
        load_weights(opened)
    assert loaded(tmp_path).weight_type == "f16"
