"""Tokenizers of a training run: bytes, byte pairs learned from the data, or one that exists."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from anymamba.checkpoint.gguf import sentencepiece_file
from anymamba.checkpoint.io import shown
from anymamba.checkpoint.tokenizer import read_tokenizer, tokenizer_file
from anymamba.errors import CheckpointError, ConfigError

END_OF_TEXT = "<|endoftext|>"


def open_tokenizer(name: str, texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """The tokenizer that a setting names.

    Args:
        name: `byte`, `bpe`, a folder, or a name on the hub.
        texts: what `bpe` learns from; nothing else reads them.
        vocab_size: how many tokens `bpe` gets.

    Raises:
        ConfigError: there is no such tokenizer.
    """
    if name == "byte":
        return wrapped(byte_tokenizer())
    if name == "bpe":
        return wrapped(train_bpe(texts, vocab_size), eos_token=END_OF_TEXT)
    try:
        return read_by_transformers(name)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"there is no tokenizer {name!r} (byte, bpe, a folder): {reason}"
        ) from None


def read_by_transformers(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or on the hub.

    Raises:
        OSError, ValueError, ImportError: there is none, or it cannot be read.
    """
    file = tokenizer_file(Path(name))
    if file is not None and file.name in sentencepiece_file.NAMES:
        return wrapped(read_tokenizer(file))  # Transformers wants another library for those
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    # Where a model has no tokenizer, Transformers makes one up, which has no words.
    if not found("a", add_special_tokens=False)["input_ids"]:
        raise ValueError("it has no tokenizer.json: put the tokenizer's files there")
    return found


def stored_tokenizer(place: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder.

    Raises:
        CheckpointError: there is none that can be read.
    """
    try:
        return read_by_transformers(place)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"no tokenizer can be read from {shown(str(place))}: {reason}"
        ) from None


def wrapped(tokenizer: Tokenizer, **special: Any) -> PreTrainedTokenizerFast:
    """As Transformers loads and saves it."""
    # The clean-up that older tokenizers ask for eats spaces before punctuation.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special
    )


def byte_symbols() -> list[str]:
    """The printable character by which the byte-level format writes each of the 256 bytes."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]


def byte_tokenizer() -> Tokenizer:
    """A byte-pair tokenizer without pairs: a token's number is the value of its byte.

    Example:
        >>> byte_tokenizer().encode("Aé").ids
        [65, 195, 169]
    """
    vocabulary = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte pairs in the way of GPT-2, learned from texts; any text can be spelled.

    Args:
        texts: what to learn from.
        vocab_size: how many tokens, at most: the 256 bytes, the end of a text, and pairs.

    Example:
        >>> train_bpe(["to be or not to be"] * 9, 260).encode("to be").tokens[0]
        'to'
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
