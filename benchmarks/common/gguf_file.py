"""A model in memory as a GGUF file, which is what llama.cpp reads.

The file has no tokenizer: it takes and gives token numbers. llama.cpp knows such files by the
tokenizer's name "no_vocab".
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from anymamba.checkpoint.gguf import writer as gguf_writing

if TYPE_CHECKING:
    from anymamba import MambaForCausalLM

__all__ = ["write_gguf"]


def write_gguf(model: MambaForCausalLM, path: Path, kind: str = "f32") -> None:
    """Write a model's weights.

    Args:
        model: a model that llama.cpp can express.
        path: the file to write.
        kind: the type of the matrices, one of `gguf_writing.GGUF_WEIGHTS`.

    Raises:
        ConfigError: llama.cpp has no such Mamba.
    """
    tensors = {name: tensor.detach().float().numpy() for name, tensor in model.state_dict().items()}
    gguf_writing.write_gguf(path, model.config.to_dict(), tensors, kind)
