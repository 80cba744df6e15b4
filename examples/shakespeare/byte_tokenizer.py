"""A tokenizer in which a token's number is the value of the byte it stands for.

It needs no training, has no special tokens, and spells any text in any language. It is written
in the format of the `tokenizers` library, so that it loads wherever other tokenizers load.
"""

from __future__ import annotations

import json
from pathlib import Path

from anymamba.training.tokenizers import byte_tokenizer


def save_byte_tokenizer(folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`."""
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # The clean-up that older tokenizers ask for eats spaces before punctuation.
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
