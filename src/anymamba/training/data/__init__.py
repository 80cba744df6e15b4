"""From files of text to batches of tokens."""

from anymamba.renamed import old_names
from anymamba.training.data.documents import TokenRow, texts_of, tokenize
from anymamba.training.data.instructions import (
    DEFAULT_TEMPLATE,
    Example,
    dataset_examples,
    is_conversation,
    read_examples,
)
from anymamba.training.data.packing import Rows, collate, cut, windows_side_by_side
from anymamba.training.data.tokenizers import open_tokenizer, stored_tokenizer

__all__ = [
    "DEFAULT_TEMPLATE",
    "Example",
    "Rows",
    "TokenRow",
    "collate",
    "cut",
    "dataset_examples",
    "is_conversation",
    "open_tokenizer",
    "read_examples",
    "stored_tokenizer",
    "texts_of",
    "tokenize",
    "windows_side_by_side",
]

__getattr__ = old_names(__name__)
