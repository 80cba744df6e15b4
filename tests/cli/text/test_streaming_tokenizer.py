"""Tokenizing a text that comes in blocks: the tokens are those of the whole."""

import random
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from anymamba.assets import bundled_model
from anymamba.cli.text import streaming_tokenizer as module
from anymamba.cli.text.streaming_tokenizer import texts_of_blocks

TRAINING = [
    "To be, or not to be: that's the question, isn't it?\n\nWe'll see; they'd said so.\n" * 3,
    "def function(self):\n        return self.value_of_things[0]\n    # déjà vu, été\n" * 3,
    "the theory of the other mother's weather, 1234567890 numbers 2024-05-06\r\n" * 3,
    "aaaaaaa " * 20,
]
# The splitting of newer tokenizers, which take line ends to the signs before them.
NEWER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokens_of_blocks(blocks, encode):
    return [encode(text) for text in texts_of_blocks(blocks, encode)]


def trained(tokenizer):
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING, trainer)
    # As in the tokenizer of state-spaces/mamba-*, whose indentations are tokens.
    tokenizer.add_tokens([" " * width for width in range(2, 9)])
    return tokenizer


def older():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return trained(tokenizer)


def newer():
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(NEWER), behavior="isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    return trained(tokenizer)


BYTES = Tokenizer.from_file(str(bundled_model() / "tokenizer.json"))
TOKENIZERS = {"older": older(), "newer": newer(), "bytes": BYTES}
PIECES = [
    *("the ", "theory", " of", "mother's", "We'll", "isn't", " ", "  ", "        ", "\n", "\r\n"),
    *("\n\n", "\t", ", ", ",\n", "!\n", "déjà", "e\u0301", "\u0301", "1234567", "<|end|>", "end|>"),
    *("self.value_of[0]", "語言，模型。", "😀", "\u00a0", "aaaaaaaaaaaa", "'", "''", "--"),
]


def encoder(name):
    return lambda text: TOKENIZERS[name].encode(text, add_special_tokens=False).ids


@pytest.fixture
def short_blocks(monkeypatch):
    """Borders are looked for often, so that a text of a test has many."""
    monkeypatch.setattr(module, "LEAST_CHARACTERS", 200)
    monkeypatch.setattr(module, "SURROUNDINGS", 64)


def cut(text, sizes):
    at = 0
    for size in sizes:
        yield text[at : at + size]
        at += size
    yield text[at:]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_tokens_are_those_of_the_whole_text(name, short_blocks):
    @given(
        st.lists(st.sampled_from(PIECES), min_size=100, max_size=400),
        st.lists(st.integers(0, 300), max_size=20),
    )
    def check(pieces, sizes):
        text = "".join(pieces)
        found = tokens_of_blocks(cut(text, sizes), encoder(name))
        assert [token for part in found for token in part] == list(encoder(name)(text))

    check()


# One word of letters alone has no border but for bytes.
@pytest.mark.parametrize(
    ("name", "kind"), [*product(TOKENIZERS, ["prose", "lines"]), ("bytes", "letters")]
)
def test_memory_does_not_grow_with_the_text(name, kind):
    """Ordinary text, one without any space, and for bytes one without any border."""
    source = random.Random(0)
    words = {"prose": ["the ", "theory ", "of, ", "it's\n"], "lines": ["theory\n", "of,\n"]}
    vocabulary = words.get(kind, ["a"])
    blocks = ("".join(source.choices(vocabulary, k=2000)) for _ in range(40))
    longest = max(len(part) for part in tokens_of_blocks(blocks, encoder(name)))
    assert longest <= 2 * module.LEAST_CHARACTERS


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_text_without_borders_is_kept_together(name):
    # A power of two would be cut rightly by chance: the letters merge in pairs.
    text = "a" * 100_003
    found = tokens_of_blocks(cut(text, [30_001] * 3), encoder(name))
    assert [token for part in found for token in part] == list(encoder(name)(text))
    assert (len(found) == 1) == (name != "bytes")


@pytest.mark.parametrize("blocks", [[], [""], ["", ""]])
def test_no_text_has_no_tokens(blocks):
    assert tokens_of_blocks(blocks, encoder("bytes")) == []


def test_a_tokenizer_that_marks_every_beginning_is_never_cut():
    """It would put its mark at each border."""

    def encode(text):
        return [1000, *text.encode()]

    blocks = ["to be " * 10_000] * 3
    assert tokens_of_blocks(blocks, encode) == [encode("".join(blocks))]
