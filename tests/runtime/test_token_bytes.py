"""Bytes of tokens, beside what the tokenizers library makes of all bytes together."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import anymamba
from anymamba.runtime.token_bytes import token_bytes

TEXT = "a é€😀\n\t\x00\xad\xa0 ÿ"


def byte_level():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({one: id for id, one in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def falling_back():
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"a": 256, "<unk>": 257}
    model = models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, falling_back])
def test_bytes_of_all_tokens_are_the_text(make):
    tokenizer = make()
    found = [token_bytes(tokenizer, id) for id in tokenizer.encode(TEXT).ids]
    known = [one if one is not None else b"a" for one in found]
    assert b"".join(known) == TEXT.encode()
    assert found.count(None) == (TEXT.count("a") if make is falling_back else 0)
    assert token_bytes(tokenizer, 10**6) is None


def test_the_bundled_tokenizer_has_a_token_for_each_byte():
    tokenizer = anymamba.load().tokenizer
    assert [token_bytes(tokenizer, id) for id in range(256)] == [bytes([id]) for id in range(256)]


def test_a_tokenizer_of_words_says_nothing():
    assert token_bytes(Tokenizer(models.WordLevel({"a": 0}, "a")), 0) is None
