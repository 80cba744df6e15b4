"""A tokenizer in a GGUF file's header, to and from the text of a tokenizer.json.

A header has two ways to hold one. `tokenizer.huggingface.json` is a whole tokenizer.json, and is
taken where it is there. llama.cpp reads the other: lists of tokens, of their types and of merges,
with `tokenizer.ggml.pre` for the rule that splits text before the merges. Published Mambas have the
tokenizer of GPT-NeoX, whose rule is GPT-2's, which llama.cpp knows by several names; Falcon-Mamba
has Falcon's, which also keeps punctuation apart and splits numbers into threes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from anymamba.checkpoint.io import shown
from anymamba.errors import CheckpointError

WHOLE = "tokenizer.huggingface.json"
CHAT_TEMPLATE = "tokenizer.chat_template"

_PREFIX = "tokenizer.ggml."
# Names of GPT-2's rule. Files from before there was a name have none: those of Mambas mean it.
_GPT2_RULES = ("gpt-2", "mpt", "olmo", "default")
_FALCON_RULE = "falcon"
_RULES = (*_GPT2_RULES, _FALCON_RULE)
_NO_TOKENIZER = ("no_vocab", "none")
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
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
        CheckpointError: the tokenizer is not byte-level BPE with GPT-2's or Falcon's rule, or is
            broken.

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
    kind = metadata.get(_PREFIX + "model", "none")
    if kind in _NO_TOKENIZER:
        return None
    rule = metadata.get(_PREFIX + "pre", "default")
    _refuse_others(metadata, kind, rule, where)
    tokens = _texts(metadata, "tokens", where)
    if len(set(tokens)) < len(tokens):
        _broken(where, "one token stands twice")
    types = _types(metadata, len(tokens), where)
    pairs = [_pair(merge, where) for merge in _texts(metadata, "merges", where)]
    text = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(tokens, types),
        "normalizer": None,
        "pre_tokenizer": _FALCON_SPLIT if rule == _FALCON_RULE else _GPT2_SPLIT,
        "post_processor": _post_processor(metadata, tokens, where),
        "decoder": _GPT2_SPLIT,
        "model": {
            "type": "BPE",
            "vocab": {t: i for i, t in enumerate(tokens) if types[i] != _UNUSED},
            "merges": pairs,
        },
    }
    return json.dumps(text, ensure_ascii=False)


def _refuse_others(metadata: Mapping[str, Any], kind: Any, rule: Any, where: str) -> None:
    defect = None
    if kind != "gpt2":
        defect = f"its kind is {shown(kind)}, expected 'gpt2', which is byte-level BPE"
    elif rule not in _RULES:
        defect = f"it splits text as {shown(rule)}, expected one of {', '.join(_RULES)}"
    elif metadata.get(_PREFIX + "add_space_prefix"):
        defect = "it puts a space before every text"
    if defect:
        raise CheckpointError(
            f"the tokenizer in {where} cannot be read: {defect}; convert the model from its "
            "original files, or read those"
        )


def _texts(metadata: Mapping[str, Any], name: str, where: str) -> list[str]:
    value = metadata.get(_PREFIX + name)
    if not isinstance(value, list):  # of texts: those of numbers are tuples
        _broken(where, f"{_PREFIX}{name} must be a list of texts, got {shown(value)}")
    return value


def _types(metadata: Mapping[str, Any], count: int, where: str) -> list[int]:
    value = metadata.get(_PREFIX + "token_type")
    if value is None:
        return [_NORMAL] * count
    if not isinstance(value, tuple) or len(value) != count:
        _broken(where, f"{_PREFIX}token_type must have one number for each of {count} tokens")
    return list(value)


def _pair(merge: str, where: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not (left and space and right):
        _broken(where, f"the merge {shown(merge)} must be two tokens with a space between")
    return left, right


def _added(tokens: list[str], types: list[int]) -> list[dict[str, Any]]:
    """The tokens that are found in a text before anything is cut or merged."""
    rules = {"single_word": False, "lstrip": False, "rstrip": False}
    return [
        {"id": i, "content": token, **rules, "normalized": not special, "special": special}
        for i, token in enumerate(tokens)
        if types[i] in (_UNKNOWN, _CONTROL, _USER_DEFINED) and token
        for special in [types[i] != _USER_DEFINED]
    ]


def _post_processor(metadata: Mapping[str, Any], tokens: list[str], where: str) -> dict[str, Any]:
    """Nothing, or the tokens that belong before and behind every text."""
    around: dict[str, dict[str, Any] | None] = {"bos": None, "eos": None}
    special: dict[str, Any] = {}
    for name in around:
        if not metadata.get(f"{_PREFIX}add_{name}_token"):
            continue
        number = metadata.get(f"{_PREFIX}{name}_token_id")
        if type(number) is not int or not 0 <= number < len(tokens):
            _broken(where, f"{_PREFIX}{name}_token_id is {shown(number)}, which is no token")
        token = tokens[number]
        special[token] = {"id": token, "ids": [number], "tokens": [token]}
        around[name] = {"SpecialToken": {"id": token, "type_id": 0}}
    if not special:
        return {**_BYTE_LEVEL, "use_regex": True}

    def with_text(letter: str, type_id: int) -> list[Any]:
        text = {"Sequence": {"id": letter, "type_id": type_id}}
        return [part for part in (around["bos"], text, around["eos"]) if part]

    single, second = with_text("A", 0), with_text("B", 1)
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single + second,
        "special_tokens": special,
    }


def llama_tokenizer(text: str, vocab_size: int) -> tuple[list[str], list[int], list[str]] | None:
    """Take from a tokenizer.json what llama.cpp needs of it.

    Args:
        text: the tokenizer.json.
        vocab_size: the embedding table's rows. Rows without a token get one that is never used.

    Returns:
        The tokens, their types, and the merges; None where llama.cpp would split text differently,
        since the tokenizer is not byte-level BPE with GPT-2's or Falcon's rule.

    Raises:
        CheckpointError: the text is no tokenizer, or has tokens that the table lacks.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
        >>> tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        >>> llama_tokenizer(tokenizer.to_str(), 4)
        (['a', 'b', 'ab', '[PAD3]'], [1, 1, 1, 5], ['a b'])
    """
    try:
        fields = json.loads(text)
        model = fields["model"]
        if llama_rule(fields) is None:
            return None
        ids: dict[str, int] = dict(model["vocab"])
        added = {token["content"]: token for token in fields.get("added_tokens") or ()}
        ids |= {content: token["id"] for content, token in added.items()}
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
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
    types = [_UNUSED] * vocab_size
    for token, i in ids.items():
        tokens[i] = token
        types[i] = _NORMAL
        if token in added:
            types[i] = _CONTROL if added[token].get("special") else _USER_DEFINED
    return tokens, types, merges


def llama_rule(fields: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of the rule by which a tokenizer splits text before the merges.

    Args:
        fields: of a tokenizer.json.

    Returns:
        "gpt-2", "falcon", or None where the tokenizer is no byte-level BPE with either.
    """
    model, before = fields["model"], fields.get("pre_tokenizer") or {}
    changes = ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "dropout")
    if model.get("type") != "BPE" or any(model.get(name) for name in changes):
        return None
    if before == _FALCON_SPLIT:
        return _FALCON_RULE
    splits = before.get("use_regex", True) and not before.get("add_prefix_space", True)
    return _GPT2_RULES[0] if before.get("type") == "ByteLevel" and splits else None


def _broken(where: str, defect: str) -> NoReturn:
    raise CheckpointError(f"the tokenizer in {where} is broken: {defect}")
