"""Tokenizers of hostile files: what they make of a text, how long they take, and Ctrl-C."""

import os
import signal
import threading
import time

import pytest
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from anymamba.checkpoint.tokenizer import MOST_GROWTH, MOST_TOKEN_CHARACTERS, tokenizer_from_json
from anymamba.errors import CheckpointError, InputError
from anymamba.runtime import tokenizer as module
from anymamba.runtime.tokenizer import TextCodec


def with_parts(**parts):
    tokenizer = Tokenizer(BPE({"a": 0, "b": 1}, []))
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer.to_str()


DOUBLE = normalizers.Replace("a", "aa")
TWICE = processors.TemplateProcessing(single="$A $A", pair="$A $B", special_tokens=[])
LONG = processors.TemplateProcessing(
    single="<s> $A",
    pair="$A $B",
    special_tokens=[{"id": "<s>", "ids": [0] * 300, "tokens": ["a"] * 300}],
)


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": normalizers.Replace("a", "b" * 300)},
        {"normalizer": normalizers.Sequence([DOUBLE] * 30)},
        {"normalizer": normalizers.Sequence([normalizers.Sequence([DOUBLE] * 5)] * 6)},
        {"normalizer": normalizers.Sequence([normalizers.Replace(Regex(""), "a")] * 30)},
        {"normalizer": normalizers.Sequence([normalizers.Prepend("a" * 20)] * 5)},
        {"normalizer": normalizers.Sequence([normalizers.ByteLevel()] * 30)},
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.ByteLevel()] * 30)},
        {
            "normalizer": normalizers.Sequence([DOUBLE] * 6),
            "pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.ByteLevel()] * 3),
        },
        {"post_processor": LONG},
        {"post_processor": processors.Sequence([TWICE] * 30)},
        {"decoder": decoders.Sequence([decoders.Replace("a", "aa")] * 30)},
    ],
)
def test_rules_that_multiply_a_text_are_refused(parts):
    with pytest.raises(CheckpointError, match=rf"^the rules of x .*at most {MOST_GROWTH} times"):
        tokenizer_from_json(with_parts(**parts), "x")


def test_a_token_of_megabytes_is_refused():
    for text in ("x" * (MOST_TOKEN_CHARACTERS + 1), '"' * (MOST_TOKEN_CHARACTERS + 1)):
        tokenizer = Tokenizer(BPE({"a": 0}, []))
        tokenizer.add_tokens([text])
        with pytest.raises(CheckpointError, match=r"^a token of x has 4,097 characters"):
            tokenizer_from_json(tokenizer.to_str(), "x")


def test_rules_of_tokenizers_in_use_are_read():
    parts = {
        "normalizer": normalizers.Sequence(
            [normalizers.NFKC(), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        ),
        "pre_tokenizer": pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(r"\d{1,3}"), "isolated"), pre_tokenizers.ByteLevel()]
        ),
        "post_processor": processors.TemplateProcessing(
            single="a $A b", pair="a $A b $B b", special_tokens=[("a", 0), ("b", 1)]
        ),
        "decoder": decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()]),
    }
    codec = TextCodec(lambda: tokenizer_from_json(with_parts(**parts), "x"))
    assert codec.encode("ab", special=True) == [0, 0, 1, 1]


def slow(field):
    """One that takes days for a few letters: nested repetitions that cannot match."""
    pattern = Regex(r"^(?:(?:a+)+)+b")
    part = decoders.Replace(pattern, "") if field == "decoder" else None
    part = part or normalizers.Replace(pattern, "")
    return TextCodec(lambda: tokenizer_from_json(with_parts(**{field: part}), "x"))


def sleeping(codec, monkeypatch):
    """Its library's calls take ten seconds, in which others have Python's lock."""

    class Sleeping:
        def encode_batch_fast(self, *_, **__):
            time.sleep(10)

        decode_batch = encode_batch_fast

    assert codec.tokenizer
    monkeypatch.setattr(codec, "tokenizer", Sleeping())


CALLS = [
    ("normalizer", lambda codec: codec.encode("aab", special=True)),
    ("decoder", lambda codec: codec.decode([0, 0, 1])),
]


@pytest.mark.parametrize(("field", "call"), CALLS)
def test_patterns_of_the_file_have_a_time(monkeypatch, field, call):
    codec = slow(field)
    sleeping(codec, monkeypatch)
    monkeypatch.setattr(module, "_MOST_SECONDS", 0.05)
    with pytest.raises(InputError, match=r"^the tokenizer fails at the .*: it takes longer than"):
        call(codec)


@pytest.mark.parametrize(("field", "call"), CALLS)
def test_ctrl_c_is_heard_in_patterns_of_the_file(monkeypatch, field, call):
    codec = slow(field)
    sleeping(codec, monkeypatch)
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        call(codec)
    assert time.monotonic() - start < 9


def test_long_texts_and_short_ones_have_the_same_tokens(monkeypatch):
    codec = TextCodec(lambda: tokenizer_from_json(with_parts(), "x"))
    text, ids = "ab" * 3000, [0, 1] * 3000
    aside = codec.encode(text, special=True), codec.decode(ids)
    monkeypatch.setattr(module, "_LONG", 1 << 30)
    assert aside == (codec.encode(text, special=True), codec.decode(ids)) == (ids, aside[1])
