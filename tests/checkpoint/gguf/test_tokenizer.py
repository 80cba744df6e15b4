"""Tokenizers of GGUF files, against the original and llama.cpp's."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers

from anymamba.checkpoint.gguf.header import read_gguf_header
from anymamba.checkpoint.gguf.reader import read_gguf
from anymamba.checkpoint.gguf.tokenizer import tokenizer_json
from anymamba.checkpoint.gguf.writer import write_gguf
from tests.support import files, gguf_files
from tests.support.files import CONFIG, TEXT
from tests.support.gguf_files import lists_of, refusal

gguf = pytest.importorskip("gguf")


texts = st.text(st.sampled_from("aeiostTH't.,!?129 \n\té中𝔘\u0301")) | st.text()


@pytest.mark.slow
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
        original = files.tokenizer()
        path = gguf_files.write(factory.mktemp("lists") / "m.gguf", **lists_of(original))
        text = read_gguf(path).tokenizer_json
        assert text is not None
        BOTH.extend([original, Tokenizer.from_str(text)])
        assert "[PAD]" not in BOTH[1].get_vocab()
    return BOTH


def test_tokens_around_every_text(file: Path) -> None:
    changes = lists_of(files.tokenizer()) | {
        "tokenizer__ggml__add_bos_token": True,
        "tokenizer__ggml__bos_token_id": 0,
        "tokenizer__ggml__add_eos_token": True,
        "tokenizer__ggml__eos_token_id": 7,
    }
    text = read_gguf(gguf_files.write(file, **changes)).tokenizer_json
    assert text is not None
    made = Tokenizer.from_str(text)
    plain = files.tokenizer().encode(TEXT).ids
    assert made.encode(TEXT).ids == [0, *plain, 7]
    assert made.encode(TEXT, add_special_tokens=False).ids == plain


@pytest.mark.parametrize("name", ["no_vocab", "none", None])
def test_no_tokenizer(name: str | None, file: Path) -> None:
    assert read_gguf(gguf_files.write(file, tokenizer__ggml__model=name)).tokenizer_json is None


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model": "t5"}, "'t5'"),
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
    lists = lists_of(files.tokenizer())
    lists |= {f"tokenizer__ggml__{name}": value for name, value in changes.items()}
    message = refusal(gguf_files.write(file, **lists))
    assert word in message


def test_llama_cpp_makes_the_same_tokens(file: Path) -> None:
    """Its rule for cutting text is the one meant by these names."""
    llama_cpp = pytest.importorskip("llama_cpp")
    tokenizer = files.tokenizer()
    write_gguf(file, CONFIG, files.tensors(), tokenizer_json=tokenizer.to_str())
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


@pytest.fixture
def falcon() -> Tokenizer:
    """The tests' tokens behind the rule of Falcon's tokenizer.json."""
    made = files.tokenizer()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ]
    )
    return made


def test_falcon_s_rule_there_and_back(falcon: Tokenizer, file: Path) -> None:
    write_gguf(file, CONFIG, files.tensors(), tokenizer_json=falcon.to_str())
    metadata = read_gguf_header(file).metadata
    assert metadata["tokenizer.ggml.pre"] == "falcon"
    del metadata["tokenizer.huggingface.json"]
    from_lists = tokenizer_json(metadata, "the lists")
    assert from_lists is not None
    again = Tokenizer.from_str(from_lists)
    for text in (TEXT, "1234567 is't... (a) -- b?!", "éé12é345!!  x"):
        assert again.encode(text).ids == falcon.encode(text).ids


def test_llama_cpp_splits_as_falcon_does(falcon: Tokenizer, file: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    write_gguf(file, CONFIG, files.tensors(), tokenizer_json=falcon.to_str())
    theirs = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    for text in (TEXT, "1234567 isn't it (a) -- b?", "a    b  c", "12 345 6789", "x.y,z; \n\n q"):
        expected = theirs.tokenize(text.encode(), add_bos=False, special=True)
        assert falcon.encode(text).ids == expected, text


@pytest.mark.parametrize("name", ["gpt-2", "mpt", "olmo"])
def test_llama_cpp_cuts_alike_by_all_these_names(name: str, file: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    tokenizer = files.tokenizer()
    gguf_files.write(
        file,
        **lists_of(tokenizer) | {"tokenizer__ggml__pre": name},
        mamba__context_length=64,
        mamba__vocab_size=320,
    )
    theirs = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    for text in (TEXT, "12345 'll DON'T don't", "\r\n \n"):
        assert tokenizer.encode(text).ids == theirs.tokenize(text.encode(), False, True)
