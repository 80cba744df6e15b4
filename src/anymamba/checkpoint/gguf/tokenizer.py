"""A tokenizer in a GGUF file's header, to and from the text of a tokenizer.json.

A header has two ways to hold one. `tokenizer.huggingface.json` is a whole tokenizer.json, and is
taken where it is there. llama.cpp reads the other: lists of tokens, of their types and of merges,
with `tokenizer.ggml.pre` for the rule that splits text before the merges. Published Mambas have the
tokenizer of GPT-NeoX, whose rule is GPT-2's, which llama.cpp knows by several names; Falcon-Mamba
has Falcon's, which also keeps punctuation apart and splits numbers into threes. Codestral's is of
another kind, that of `anymamba.checkpoint.gguf.sentencepiece`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from anymamba.checkpoint.gguf.sentencepiece import (
    KIND,
    from_sentencepiece,
    is_sentencepiece,
    to_sentencepiece,
)
from anymamba.checkpoint.gguf.token_lists import (
    CONTROL,
    NORMAL,
    PREFIX,
    UNUSED,
    USER_DEFINED,
    added_tokens,
    post_processor,
    refuse_broken,
    texts_of,
    types_of,
)
from anymamba.checkpoint.io import shown
from anymamba.errors import CheckpointError

WHOLE = "tokenizer.huggingface.json"
CHAT_TEMPLATE = "tokenizer.chat_template"

# Names of GPT-2's rule. Files from before there was a name have none: those of Mambas mean it.
_GPT2_RULES = ("gpt-2", "mpt", "olmo", "default")
_FALCON_RULE = "falcon"
_RULES = (*_GPT2_RULES, _FALCON_RULE)
_NO_TOKENIZER = ("no_vocab", "none")
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_GPT2_SPLIT: dict[str, Any] = {**_BYTE_LEVEL, "use_regex": True}
_THREES = {"type": "Split", "pattern": {"Regex": "[0-9][0-9][0-9]"}}
_FALCON_SPLIT: dict[str, Any] = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Punctuation", "behavior": "Contiguous"},
        _GPT2_SPLIT,
        {"type": "Digits", "individual_digits": False},
        {**_THREES, "behavior": "Isolated", "invert": False},
    ],
}


def tokenizer_json(metadata: Mapping[str, Any], where: str) -> str | None:
    """Make a tokenizer.json of what the header of the file `where` says.

    Returns:
        The text, or None where the file says that it has no tokenizer. Its tokens and merges are
        only known to fit together once a `tokenizers.Tokenizer` was made of it.

    Raises:
        CheckpointError: the tokenizer is neither byte-level BPE with GPT-2's or Falcon's rule nor
            SentencePiece's, or is broken.

    Example:
        >>> header = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b", "ab"],
        ...           "tokenizer.ggml.merges": ["a b"]}
        >>> from tokenizers import Tokenizer
        >>> Tokenizer.from_str(tokenizer_json(header, "the example")).encode("abba").tokens
        ['ab', 'b', 'a']
    """
    whole = metadata.get(WHOLE)
    if isinstance(whole, str) and whole:
        return whole
    kind = metadata.get(PREFIX + "model", "none")
    if kind in _NO_TOKENIZER:
        return None
    if kind == KIND:
        return json.dumps(from_sentencepiece(metadata, where), ensure_ascii=False)
    rule = metadata.get(PREFIX + "pre", "default")
    _refuse_others(metadata, kind, rule, where)
    tokens = texts_of(metadata, "tokens", where)
    if len(set(tokens)) < len(tokens):
        refuse_broken(where, "one token stands twice")
    types = types_of(metadata, len(tokens), where)
    pairs = [_pair(merge, where) for merge in texts_of(metadata, "merges", where)]
    text = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(tokens, types),
        "normalizer": None,
        "pre_tokenizer": _FALCON_SPLIT if rule == _FALCON_RULE else _GPT2_SPLIT,
        "post_processor": post_processor(metadata, tokens, where) or _GPT2_SPLIT,
        "decoder": _GPT2_SPLIT,
        "model": {
            "type": "BPE",
            "vocab": {t: i for i, t in enumerate(tokens) if types[i] != UNUSED},
            "merges": pairs,
        },
    }
    return json.dumps(text, ensure_ascii=False)


def _refuse_others(metadata: Mapping[str, Any], kind: Any, rule: Any, where: str) -> None:
    defect = None
    if kind != "gpt2":
        defect = (
            f"its kind is {shown(kind)}, expected 'gpt2', which is byte-level BPE, or {KIND!r}, "
            "which is SentencePiece's"
        )
    elif rule not in _RULES:
        defect = f"it splits text as {shown(rule)}, expected one of {', '.join(_RULES)}"
    elif metadata.get(PREFIX + "add_space_prefix"):
        defect = "it puts a space before every text"
    if defect:
        raise CheckpointError(
            f"the tokenizer in {where} cannot be read: {defect}; convert the model from its "
            "original files, or read those"
        )


def _pair(merge: str, where: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not (left and space and right):
        refuse_broken(where, f"the merge {shown(merge)} must be two tokens with a space between")
    return left, right


def llama_tokenizer(text: str, vocab_size: int) -> dict[str, Any] | None:
    """Take from a tokenizer.json what llama.cpp needs of it.

    Args:
        text: the tokenizer.json.
        vocab_size: the embedding table's rows. Rows without a token get one that is never used.

    Returns:
        A header's values, by their names behind "tokenizer.ggml."; None where llama.cpp would make
        other tokens, since the tokenizer is neither byte-level BPE with GPT-2's or Falcon's rule
        nor one of SentencePiece's.

    Raises:
        CheckpointError: the text is no tokenizer, or has tokens that the table lacks.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
        >>> tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        >>> header = llama_tokenizer(tokenizer.to_str(), 4)
        >>> header["tokens"], header["token_type"], header["merges"]
        (['a', 'b', 'ab', '[PAD3]'], [1, 1, 1, 5], ['a b'])
    """
    try:
        fields = json.loads(text)
        model = fields["model"]
        rule = _rule(fields)
        if rule is None and not is_sentencepiece(fields):
            return None
        ids: dict[str, int] = dict(model["vocab"])
        added = {token["content"]: token for token in fields.get("added_tokens") or ()}
        ids |= {content: token["id"] for content, token in added.items()}
        pairs = [m.partition(" ")[::2] if isinstance(m, str) else tuple(m) for m in model["merges"]]
        merges = [(left, right) for left, right in pairs]
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"tokenizer.json is broken ({type(error).__name__}: {shown(error)}); fetch it again"
        ) from error
    if any(type(i) is not int or not 0 <= i < vocab_size for i in ids.values()):
        raise CheckpointError(
            f"tokenizer.json has tokens that the model's vocabulary of {vocab_size} lacks; "
            "it belongs to another model"
        )
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, i in ids.items():
        tokens[i] = token
        types[i] = NORMAL
        if token in added:
            types[i] = CONTROL if added[token].get("special") else USER_DEFINED
    if rule is None:
        return to_sentencepiece(fields, tokens, types, merges)
    joined = [f"{left} {right}" for left, right in merges]
    return {"model": "gpt2", "pre": rule, "tokens": tokens, "token_type": types, "merges": joined}


def _rule(fields: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of the rule by which byte-level BPE splits text before the merges."""
    model, before = fields["model"], fields.get("pre_tokenizer") or {}
    changes = ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "dropout")
    if model.get("type") != "BPE" or any(model.get(name) for name in changes):
        return None
    if before == _FALCON_SPLIT:
        return _FALCON_RULE
    splits = before.get("use_regex", True) and not before.get("add_prefix_space", True)
    return _GPT2_RULES[0] if before.get("type") == "ByteLevel" and splits else None
