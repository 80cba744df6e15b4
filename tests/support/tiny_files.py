"""Small models on disk, written without the package under test and without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

# No two sizes alike but those that blocks of 32 ask for: d 32, e 64, n 5, r 3, k 4, v 320.
CONFIG: dict[str, Any] = {
    "model_type": "mamba",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "vocab_size": 320,
    "state_size": 5,
    "time_step_rank": 3,
    "expand": 2,
    "conv_kernel": 4,
    "layer_norm_epsilon": 1e-5,
    "use_bias": False,
    "use_conv_bias": True,
    "tie_word_embeddings": True,
}
TEXT = "It's a long way, isn't it?  To be   or not to be 1234\n\n\tis THE question. " * 8


def tensors(tied: bool = True, layers: int = 2) -> dict[str, NDArray[Any]]:
    """Random weights of the model above in Transformers' names, spelt out."""
    shapes: dict[str, tuple[int, ...]] = {"backbone.embeddings.weight": (320, 32)}
    for layer in range(layers):
        prefix = f"backbone.layers.{layer}."
        shapes |= {
            prefix + "norm.weight": (32,),
            prefix + "mixer.in_proj.weight": (128, 32),
            prefix + "mixer.conv1d.weight": (64, 1, 4),
            prefix + "mixer.conv1d.bias": (64,),
            prefix + "mixer.x_proj.weight": (13, 64),
            prefix + "mixer.dt_proj.weight": (64, 3),
            prefix + "mixer.dt_proj.bias": (64,),
            prefix + "mixer.A_log": (64, 5),
            prefix + "mixer.D": (64,),
            prefix + "mixer.out_proj.weight": (32, 64),
        }
    shapes["backbone.norm_f.weight"] = (32,)
    if not tied:
        shapes["lm_head.weight"] = (320, 32)
    rng = np.random.default_rng(0)
    return {n: 0.3 * rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def tokenizer() -> Tokenizer:
    """Byte-level BPE as GPT-NeoX has it: control tokens first, runs of spaces last."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([TEXT], trainer)
    made.add_tokens([AddedToken("    ", normalized=True), AddedToken("  ", normalized=True)])
    return made


def write_folder(
    folder: Path, stored: dict[str, NDArray[Any]] | None = None, **changes: Any
) -> Path:
    """A whole model's folder in Transformers' layout, with a tokenizer."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    save_file(tensors() if stored is None else stored, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text(tokenizer().to_str())
    (folder / "generation_config.json").write_text('{"eos_token_id": 0}')
    return folder


def one_line(error: BaseException) -> str:
    """An error's message, which must be a single line of readable length."""
    message = str(error)
    assert message == message.strip()
    assert len(message.splitlines()) == 1
    assert len(message) < 1500
    message.encode("utf-8")
    return message
