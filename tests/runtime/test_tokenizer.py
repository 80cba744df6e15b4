"""Tokens of text, and text of tokens."""

import json
from contextlib import suppress
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from anymamba.assets import bundled_model
from anymamba.checkpoint.tokenizer import read_tokenizer, tokenizer_from_json
from anymamba.errors import CheckpointError, InputError
from anymamba.runtime.tokenizer import TextCodec
from tests.support.files import refusal

BUNDLED = TextCodec(partial(read_tokenizer, bundled_model()))


@given(st.text())
def test_a_text_comes_back(text):
    ids = BUNDLED.encode(text, special=True)
    assert ids == list(text.encode())  # the bundled model's tokens are bytes
    assert BUNDLED.decode(ids) == text


@given(st.binary())
def test_any_tokens_are_a_text(ids):
    assert BUNDLED.decode(list(ids)) == ids.decode(errors="replace")


def test_tokens_that_only_the_model_has_are_no_text():
    assert BUNDLED.decode([72, 256, 50_279, 105]) == "Hi"


@pytest.mark.parametrize("ids", [[-1], [2**40], [1.5], ["a"], [None]])
def test_what_is_no_token(ids):
    with pytest.raises(InputError, match=r"^tokens must be whole numbers, 0 or more"):
        BUNDLED.decode(ids)


@pytest.mark.parametrize("text", ["\ud800", "a\udfff", None, 1])
def test_what_is_no_text(text):
    with pytest.raises(InputError, match=r"^the text (cannot be encoded|holds half)"):
        BUNDLED.encode(text, special=True)


def small_tokenizer():
    tokenizer = Tokenizer(BPE({char: id for id, char in enumerate("Ġabc")}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def test_long_texts_are_neither_cut_off_nor_filled_up(tmp_path):
    tokenizer = small_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    codec = TextCodec(partial(read_tokenizer, tmp_path))
    assert codec.encode("abcabc", special=True) == [1, 2, 3, 1, 2, 3]
    assert codec.encode("ab", special=True) == [1, 2]


def test_special_tokens_are_shown_on_demand():
    tokenizer = small_tokenizer()
    codec = TextCodec(lambda: tokenizer)
    assert codec.decode([1, 4, 0, 2]) == "a b"
    assert codec.decode([1, 4, 0, 2], skip_special=False) == "a<end> b"


def test_a_folder_and_its_file_are_the_same():
    by_file = read_tokenizer(bundled_model() / "tokenizer.json")
    assert by_file.to_str() == BUNDLED.tokenizer.to_str()


def test_a_model_without_a_tokenizer():
    codec = TextCodec(None)
    assert not codec.exists
    with pytest.raises(CheckpointError, match=r"comes without a tokenizer\. Name a folder"):
        codec.encode("a", special=True)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"there is no tokenizer: .*tokenizer\.json is missing"
    ):
        read_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=r"there is no tokenizer: .*nowhere is missing"):
        read_tokenizer(tmp_path / "nowhere")


WHOLE = json.loads((bundled_model() / "tokenizer.json").read_text())


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 10_000,
        json.dumps(WHOLE | {"model": None}).encode(),
        json.dumps(WHOLE | {"model": WHOLE["model"] | {"merges": [["x", "y"]]}}).encode(),
        json.dumps(WHOLE | {"model": WHOLE["model"] | {"vocab": {"a": -1}}}).encode(),
        json.dumps(WHOLE | {"decoder": {"type": "Unknown"}}).encode(),
        json.dumps(WHOLE).encode()[:-1],
    ],
)
def test_a_broken_file_is_named(tmp_path, text):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(text)
    message = refusal(CheckpointError, read_tokenizer, tmp_path)
    assert "no tokenizer that can be read" in message
    assert str(file) in message
    assert len(message) < 500


@given(st.data())
def test_no_broken_file_ends_the_process(data):
    whole = (bundled_model() / "tokenizer.json").read_bytes()
    at = data.draw(st.integers(0, len(whole)))
    length = data.draw(st.integers(0, 20))
    text = whole[:at] + data.draw(st.binary(max_size=20)) + whole[at + length :]
    codec = TextCodec(lambda: tokenizer_from_json(text, "it"))
    with suppress(CheckpointError):
        codec.decode(codec.encode("ROMEO: é", special=True))


def test_half_of_a_surrogate_pair_is_called_so():
    codec = TextCodec(lambda: read_tokenizer(bundled_model()))
    with pytest.raises(InputError, match="half of a surrogate pair"):
        codec.encode("a\ud800", special=True)
