"""SentencePiece's tokenizers in GGUF files make llama.cpp's tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from anymamba.checkpoint.gguf.header import read_gguf_header
from anymamba.checkpoint.gguf.reader import read_gguf
from anymamba.checkpoint.gguf.tokenizer import llama_tokenizer, tokenizer_json
from anymamba.checkpoint.gguf.writer import write_gguf
from tests.support import files, gguf_files
from tests.support.files import CONFIG, TEXT
from tests.support.gguf_files import refusal

gguf = pytest.importorskip("gguf")

SPACE = "\u2581"
SPECIAL = ["<unk>", "<s>", "</s>", "[INST]"]
SIZE = 448
BODY = TEXT + "banana bandana aaaa nnnn ana " * 9 + "    four  spaces" * 9 + "é中é中 été\n\n" * 9


def pieces() -> list[str]:
    """What a trainer finds worth a token, single characters first, and runs of spaces."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator([BODY], trainers.BpeTrainer(vocab_size=150, show_progress=False))
    found = trained.get_vocab()
    runs = [SPACE * n for n in (2, 4, 3, 8)]
    return sorted(found, key=lambda piece: (len(piece) > 1, found[piece])) + runs


def vocabulary() -> dict[str, int]:
    """As Mistral's: special tokens, bytes, pieces in the order of their merges."""
    in_order = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces()]
    return {token: i for i, token in enumerate(in_order)}


def sentencepiece(prefix: str = "normalizer", bos: bool = True) -> Tokenizer:
    """A tokenizer as Transformers makes it of a file of SentencePiece's."""
    vocab = vocabulary()
    merges = [
        (token[:cut], token[cut:])
        for token in vocab
        for cut in range(1, len(token))
        if token not in SPECIAL and token[:cut] in vocab and token[cut:] in vocab
    ]
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    made = Tokenizer(model)
    escape = normalizers.Replace(" ", SPACE)
    if prefix == "normalizer":
        made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), escape])
    elif prefix == "none":
        made.normalizer = escape
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prefix, split=False)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    made.add_special_tokens(SPECIAL)
    if bos:
        made.post_processor = TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return made


def write(path: Path, tokenizer: Tokenizer) -> Path:
    rows = np.ones((SIZE, CONFIG["hidden_size"]), np.float32)
    tensors = files.tensors() | {"backbone.embeddings.weight": rows}
    config = CONFIG | {"vocab_size": SIZE, "bos_token_id": 0}
    write_gguf(path, config, tensors, tokenizer_json=tokenizer.to_str())
    return path


def from_lists(path: Path) -> Tokenizer:
    metadata = read_gguf_header(path).metadata
    metadata.pop("tokenizer.huggingface.json", None)
    text = tokenizer_json(metadata, "the lists")
    assert text is not None
    return Tokenizer.from_str(text)


texts = st.lists(
    st.one_of(
        st.text(st.sampled_from("aebn stT\n\té中𝔘\u0301" + SPACE), max_size=12),
        st.sampled_from([*SPECIAL, "    ", "banana", "<0x41>", " is", "[PAD440]"]),
        st.text(max_size=6),
    ),
    max_size=6,
).map(lambda parts: "".join(parts).encode("utf-8", "ignore").decode())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The original, what its lists make, and llama.cpp's, with and without a space before texts."""
    llama_cpp = pytest.importorskip("llama_cpp")
    found = {}
    for prefix in ("normalizer", "none"):
        path = write(tmp_path_factory.mktemp(prefix) / "m.gguf", sentencepiece(prefix))
        theirs = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        found[prefix] = sentencepiece(prefix), from_lists(path), theirs
    yield found
    for _, _, theirs in found.values():
        theirs.close()


@settings(max_examples=300)
@given(text=texts, prefix=st.sampled_from(["normalizer", "none"]))
def test_llama_cpp_makes_the_same_tokens(text: str, prefix: str, made: dict[str, Any]) -> None:
    original, again, llama = made[prefix]
    expected = llama.tokenize(text.encode(), add_bos=True, special=True)
    assert original.encode(text).ids == expected
    assert again.encode(text).ids == expected
    if prefix == "normalizer":
        assert again.decode(expected) == original.decode(expected)


def test_the_lists_are_those_of_llama_cpp_s_converter(file: Path) -> None:
    metadata = read_gguf_header(write(file, sentencepiece())).metadata
    of = {name: metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "scores")}
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert of["tokens"][: len(vocabulary())] == list(vocabulary())
    assert of["token_type"][:5] == (2, 3, 3, 3, 6)
    assert (of["token_type"][300], of["token_type"][-1]) == (1, 5)
    merged = [i for i, score in enumerate(of["scores"]) if score]
    assert len(merged) > 60
    # The later a token in the vocabulary, the worse, as SentencePiece numbers them.
    assert [of["scores"][i] for i in merged] == [-float(n) for n in range(1, len(merged) + 1)]
    assert metadata["tokenizer.ggml.add_space_prefix"] is True
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.bos_token_id"] == 1  # the tokenizer's, not the config's


@pytest.mark.parametrize(
    ("prefix", "added"), [("always", True), ("first", True), ("never", False), ("none", False)]
)
def test_metaspace_and_its_normalizer(prefix: str, added: bool, file: Path) -> None:
    tokenizer = sentencepiece(prefix, bos=False)
    again = from_lists(write(file, tokenizer))
    metadata = read_gguf_header(file).metadata
    assert metadata["tokenizer.ggml.add_space_prefix"] is added
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    for text in (TEXT, "banana  ana\n", "é中𝔘"):
        assert again.encode(text).ids == tokenizer.encode(text).ids
    assert read_gguf(file).tokenizer_json == tokenizer.to_str()


def changed(change: Any) -> dict[str, Any] | None:
    fields = json.loads(sentencepiece().to_str())
    change(fields)
    return llama_tokenizer(json.dumps(fields), SIZE)


def test_what_llama_cpp_would_merge_otherwise_has_no_lists() -> None:
    """A list of merges says more than scores can."""
    assert changed(lambda fields: None) is not None
    merges = json.loads(sentencepiece().to_str())["model"]["merges"]
    both = next(m for m in merges if sum("".join(n) == "".join(m) for n in merges) > 1)
    assert changed(lambda fields: fields["model"]["merges"].remove(both)) is None
    assert changed(lambda fields: fields["model"]["merges"].append(both)) is None
    assert changed(lambda fields: fields["model"].update(ignore_merges=True)) is None
    assert changed(lambda fields: fields["model"].update(byte_fallback=False)) is None
    assert changed(lambda fields: fields["model"]["vocab"].pop("<0x41>")) is None
    assert changed(lambda fields: fields.update(normalizer={"type": "NFC"})) is None
    split = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True}
    assert changed(lambda fields: fields.update(normalizer=None, pre_tokenizer=split)) is None
    digits = {"type": "Split", "pattern": {"Regex": str(Regex("[0-9]"))}}
    assert changed(lambda fields: fields.update(pre_tokenizer=digits)) is None
    assert changed(lambda fields: fields.update(post_processor={"type": "ByteLevel"})) is None


def lists(**changes: Any) -> dict[str, Any]:
    found = llama_tokenizer(sentencepiece().to_str(), SIZE)
    assert found is not None
    return {f"tokenizer__ggml__{name}": value for name, value in (found | changes).items()}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"tokens": None}, "tokens"),
        ({"tokens": ["a"] * SIZE}, "twice"),
        ({"tokens": [f"t{i}" for i in range(SIZE)]}, "no token for the byte <0x00>"),
        ({"token_type": [1, 2]}, "token_type"),
        ({"scores": None}, "scores"),
        ({"scores": [1.0, 2.0]}, "scores"),
        ({"scores": [1] * SIZE}, "scores must be numbers"),
        ({"scores": [float("nan")] * SIZE}, "scores must be numbers"),
        ({"scores": [0.0] * SIZE}, "have one score"),
        ({"bos_token_id": SIZE}, "bos_token_id"),
        ({"tokens": [*vocabulary(), *("x" * (200 + i) for i in range(SIZE))][:SIZE],
          "token_type": [1] * SIZE}, "characters"),
    ],
)  # fmt: skip
def test_broken_lists_are_named(changes: dict[str, Any], word: str, file: Path) -> None:
    gguf_files.write(file, **lists(**changes))
    assert word in refusal(file)


def test_what_a_header_leaves_out_is_what_llama_cpp_takes(file: Path) -> None:
    left_out = ("add_bos_token", "bos_token_id", "add_space_prefix", "add_eos_token")
    gguf_files.write(file, **lists(**dict.fromkeys(left_out)))
    assert from_lists(file).encode(TEXT).ids == sentencepiece().encode(TEXT).ids
