"""Folders of random weights that read and write texts: each byte is a token of its own."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from common.shapes import Shape
from contenders.anymamba_model import random_model

__all__ = ["write_checkpoint"]


def write_checkpoint(shape: Shape, folder: Path) -> Path:
    """Write a model and a tokenizer for it."""
    random_model(shape).save_pretrained(folder)
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    pair = ("Ł", "ł")  # of bytes that no text has: llama.cpp wants a merge
    words = [*bytes_, "".join(pair), *(f"w{i}" for i in range(shape.vocab_size - len(bytes_) - 1))]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [pair]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
