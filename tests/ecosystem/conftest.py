"""A small checkpoint with a tokenizer, as another library would find it on disk; no network."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from anymamba import MambaConfig, MambaForCausalLM, register, unregister

END = "<|end|>"
TEXTS = [
    "To be, or not to be, that is the question.",
    "All the world's a stage, and all the men and women merely players.",
    "Now is the winter of our discontent made glorious summer.",
    "If music be the food of love, play on.",
    "The quality of mercy is not strained.",
    "We are such stuff as dreams are made on.",
    "Brevity is the soul of wit.",
    "Some are born great, some achieve greatness.",
]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and one that ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with config, weights and tokenizer of a random two-layer model."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    config = MambaConfig(
        vocab_size=264,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
        initializer_range=0.5,  # far apart logits: greedy text without ties
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
    )
    MambaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def texts() -> list[str]:
    """A small text set."""
    return list(TEXTS)


@pytest.fixture
def registered() -> Iterator[None]:
    """AnyMamba behind the Auto classes, for one test."""
    register()
    yield
    unregister()


@pytest.fixture
def model(checkpoint: Path) -> MambaForCausalLM:
    return MambaForCausalLM.from_pretrained(checkpoint)


@pytest.fixture
def transformers_model(checkpoint: Path) -> transformers.MambaForCausalLM:
    """Transformers' own Mamba with the same weights, to compare with."""
    return transformers.MambaForCausalLM.from_pretrained(checkpoint)
