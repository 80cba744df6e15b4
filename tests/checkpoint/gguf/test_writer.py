"""GGUF files are written as the `gguf` package writes them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anymamba.checkpoint.gguf.header import read_gguf_header
from anymamba.checkpoint.gguf.reader import read_gguf
from anymamba.checkpoint.gguf.writer import GGUF_WEIGHTS, write_gguf
from anymamba.errors import CheckpointError, ConfigError
from tests.support import files, gguf_files
from tests.support.files import CONFIG, one_line

gguf = pytest.importorskip("gguf")
IN_PROJ = "backbone.layers.1.mixer.in_proj.weight"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("weights", GGUF_WEIGHTS)
def test_writes_what_the_package_writes(weights: str, tied: bool, file: Path) -> None:
    config = CONFIG | {"tie_word_embeddings": tied}
    write_gguf(file, config, files.tensors(tied), weights)
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
    text = files.tokenizer().to_str()
    write_gguf(file, CONFIG, files.tensors(), tokenizer_json=text, chat_template="{{ x }}")
    model = read_gguf(file)
    assert (model.tokenizer_json, model.chat_template) == (text, "{{ x }}")


def test_a_tokenizer_that_llama_cpp_lacks_is_kept_whole_alone(file: Path) -> None:
    fields = json.loads(files.tokenizer().to_str())
    fields["pre_tokenizer"]["use_regex"] = False
    text = json.dumps(fields)
    write_gguf(file, CONFIG, files.tensors(), tokenizer_json=text)
    metadata = read_gguf_header(file).metadata
    assert metadata["tokenizer.ggml.model"] == "no_vocab"
    assert "tokenizer.ggml.tokens" not in metadata
    assert read_gguf(file).tokenizer_json == text


@pytest.mark.parametrize(
    "text", ["{}", "x", '{"model": {"type": "BPE", "vocab": {"\\ud800": 0}, "merges": []}}']
)
def test_a_broken_tokenizer_is_not_written(text: str, file: Path) -> None:
    with pytest.raises(CheckpointError, match="tokenizer"):
        write_gguf(file, CONFIG, files.tensors(), tokenizer_json=text)
    assert not list(file.parent.iterdir())


def test_a_tokenizer_of_another_model_is_not_written(file: Path) -> None:
    text = files.tokenizer().to_str()
    small = {n: t[:100] if "embed" in n else t for n, t in files.tensors().items()}
    with pytest.raises(CheckpointError, match="vocabulary of 100"):
        write_gguf(file, CONFIG | {"vocab_size": 100}, small, tokenizer_json=text)


@pytest.mark.parametrize(
    "changes", [{"expand": 3}, {"use_bias": True}, {"use_conv_bias": False}, {"hidden_act": "gelu"}]
)
def test_what_llama_cpp_cannot_express_is_refused(changes: dict[str, Any], file: Path) -> None:
    with pytest.raises(ConfigError, match="expand=2") as caught:
        write_gguf(file, CONFIG | changes, {})
    assert next(iter(changes)) in one_line(caught.value)


@pytest.mark.parametrize("number", [1e5, np.inf, np.nan])
def test_numbers_that_float16_cannot_hold_are_refused(number: float, file: Path) -> None:
    tensors = files.tensors()
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
        write_gguf(file, CONFIG, files.tensors(), "int8")
