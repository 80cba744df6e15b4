"""Reading a tokenizer.json, within limits, because it comes from a stranger."""

from anymamba.checkpoint.tokenizer.reader import (
    HELP,
    raise_if_foreign,
    read_tokenizer,
    reason_of,
    tokenizer_from_json,
)

__all__ = ["HELP", "raise_if_foreign", "read_tokenizer", "reason_of", "tokenizer_from_json"]
