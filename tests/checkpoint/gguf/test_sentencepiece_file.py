"""SentencePiece's own files, as Mistral's `tokenizer.model.v3`, written with Google's library."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import anymamba
from anymamba.checkpoint.gguf.sentencepiece_file import NAMES, to_json
from anymamba.checkpoint.source import companions_in
from anymamba.errors import CheckpointError
from anymamba.runtime.convert import convert
from anymamba.training.data.tokenizers import stored_tokenizer
from tests.checkpoint.gguf.test_sentencepiece import SIZE, SPECIAL, sentencepiece, texts, vocabulary
from tests.support.files import refusal, write_folder

pytest.importorskip("google.protobuf")
from transformers.utils import sentencepiece_model_pb2_new as proto


def described(**changes: Any) -> Any:
    """The file as SentencePiece's trainer writes it: scores fall from merge to merge."""
    model = proto.ModelProto()
    model.trainer_spec.model_type = 2  # BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.train_extremely_large_corpus = False
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.remove_extra_whitespaces = False
    for token, i in vocabulary().items():
        kind = 1 if i >= len(SPECIAL) + 256 else 6 if i >= len(SPECIAL) else 2 if i == 0 else 3
        model.pieces.add(piece=token, type=kind, score=-float(i) if kind == 1 else 0.0)
    for name, value in changes.items():
        part, _, field = name.partition("__")
        setattr(getattr(model, part), field, value)
    return model


DATA: bytes = described().SerializeToString()
ORIGINAL, READ = sentencepiece(), Tokenizer.from_str(to_json(DATA, "the file"))


@settings(max_examples=100)
@given(text=texts)
def test_it_makes_the_tokens_that_transformers_makes(text: str) -> None:
    ids = ORIGINAL.encode(text).ids
    assert READ.encode(text).ids == ids
    assert READ.decode(ids) == ORIGINAL.decode(ids)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_with_such_a_file_alone(name: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", model_type="mamba2", vocab_size=SIZE)
    (folder / "tokenizer.json").unlink()
    (folder / name).write_bytes(DATA)
    text = "banana is\n  é中"
    expected = ORIGINAL.encode(text).ids
    assert anymamba.load(folder).tokenize(text) == expected
    assert stored_tokenizer(folder)(text)["input_ids"] == expected
    assert {"tokenizer.json", name} <= companions_in(folder).keys()
    pytest.importorskip("gguf")
    for layout, place in (("transformers", "copy"), ("gguf", "model.gguf")):
        made = convert(folder, tmp_path / place, layout)
        assert anymamba.load(made).tokenize(text) == expected
    # A tokenizer.json beside it counts.
    shutil.copy(write_folder(tmp_path / "other") / "tokenizer.json", folder)
    assert anymamba.load(folder).tokenize(text) != expected


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"trainer_spec__model_type": 1}, "not BPE"),
        ({"normalizer_spec__precompiled_charsmap": b"x"}, "rewrites characters"),
        ({"normalizer_spec__remove_extra_whitespaces": True}, "removes spaces"),
        ({"normalizer_spec__escape_whitespaces": False}, "U\\+2581"),
    ],
)
def test_other_models_are_named(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(CheckpointError, match=f"the file cannot be read: .*{word}"):
        to_json(described(**changes).SerializeToString(), "the file")


def test_without_a_token_for_the_beginning_and_a_space_before_texts() -> None:
    other = described(trainer_spec__bos_id=-1, normalizer_spec__add_dummy_prefix=False)
    read = Tokenizer.from_str(to_json(other.SerializeToString(), "the file"))
    expected = sentencepiece("none", bos=False)
    for text in ("banana", "  is it", "é𝔘"):
        assert read.encode(text).ids == expected.encode(text).ids


@settings(max_examples=80)
@given(at=st.integers(0, len(DATA) - 1), data=st.binary(max_size=9), cut=st.booleans())
def test_damage_is_refused_or_harmless(at: int, data: bytes, cut: bool) -> None:
    damaged = DATA[:at] + (b"" if cut else data + DATA[at + len(data) :])
    with suppress(CheckpointError):
        to_json(damaged, "the file")


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / NAMES[0]).write_bytes(DATA[:-3])
    assert NAMES[0] in refusal(CheckpointError, companions_in, tmp_path)
