"""`anymamba convert`: other layouts, and GGUF."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from anymamba.assets import bundled_model


def test_there_and_back_is_the_same_model(tiny, tmp_path, anymamba):
    original, back = tmp_path / "original", tmp_path / "back"
    facts = anymamba("convert", tiny, original, "--layout", "original", "--json").json
    assert facts["layout"] == "original"
    assert facts["destination"] == str(original)
    assert facts["bytes"] == sum(file.stat().st_size for file in original.iterdir())
    assert json.loads((original / "config.json").read_text())["d_model"] == 16
    done = anymamba("convert", original, back)
    assert done.out.startswith(f"{back}: transformers, ")
    weights, same = load_file(tiny / "model.safetensors"), load_file(back / "model.safetensors")
    assert weights.keys() == same.keys()
    assert all(np.array_equal(weights[name], same[name]) for name in weights)


def test_gguf_by_its_name(tmp_path, anymamba):
    pytest.importorskip("gguf")
    file, back = tmp_path / "model.gguf", tmp_path / "back"
    facts = anymamba("convert", bundled_model(), file, "--weights", "f32", "--json").json
    assert facts["layout"] == "gguf"
    assert anymamba("convert", file, back).status == 0
    options = ("--temperature", 0, "--max-new-tokens", 20, "--json")
    texts = {
        anymamba("generate", "ROMEO:", *options, "--model", model).json["text"]
        for model in (file, back)
    }
    assert len(texts) == 1
    facts = anymamba("info", file, "--json").json
    assert facts["layout"] == "gguf"
    assert facts["parameters"] == anymamba("info", bundled_model(), "--json").json["parameters"]
    assert facts["metadata"]["general.architecture"] == "mamba"
    # Long values are told by their lengths.
    assert max(len(str(value)) for value in facts["metadata"].values()) <= 200
    assert any(str(value).endswith(" characters") for value in facts["metadata"].values())
    assert "general.architecture" in anymamba("info", file).out


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--layout", "onnx"), "onnx"),
        (("--weights", "int3"), "int3"),
        (("--layout", "minimal"), "minimal"),  # which has no head of its own
    ],
)
def test_what_makes_no_sense_is_refused(options, named, tiny, tmp_path, anymamba):
    assert named in anymamba("convert", tiny, tmp_path / "new", *options).complaint
    assert not (tmp_path / "new").exists()


def test_nothing_is_replaced_unasked(tiny, tmp_path, anymamba):
    new = tmp_path / "new"
    assert anymamba("convert", tiny, new).status == 0
    assert "new" in anymamba("convert", tiny, new).complaint
    assert anymamba("convert", tiny, new, "--overwrite").status == 0


def test_a_broken_gguf_file_is_refused(tmp_path, anymamba):
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF" + bytes(7))
    assert str(file) in anymamba("convert", file, tmp_path / "new").complaint
    assert str(file) in anymamba("info", file).complaint
