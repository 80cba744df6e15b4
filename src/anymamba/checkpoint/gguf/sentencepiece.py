"""SentencePiece's BPE with byte fallback, as in Llama and Codestral, to and from a GGUF header.

llama.cpp merges two neighbours whenever their text together is a token, those of the best score
first. A tokenizer.json has a list of merges instead, the best first. The two agree where the list
has each pair of tokens that makes a token, all pairs of one token together: so the list follows
from the scores, and the scores from the list. Spaces are written as U+2581, and characters without
a token as their bytes.

Two ways of one token that overlap, as the three in "a" + "aa" + "a", are the one difference:
llama.cpp takes the left one.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

from anymamba.checkpoint.gguf.token_lists import (
    BYTE,
    NORMAL,
    PREFIX,
    UNKNOWN,
    UNUSED,
    added_tokens,
    post_processor,
    refuse_broken,
    texts_of,
    types_of,
)
from anymamba.checkpoint.io import shown

KIND = "llama"
"""llama.cpp's name of such a tokenizer."""

_SPACE = "\u2581"
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_OF_BYTES = frozenset(_BYTES)
_LONGEST = 128  # characters of a token; SentencePiece makes at most 16 unless told otherwise
_PREPEND: dict[str, Any] = {"type": "Prepend", "prepend": _SPACE}
_REPLACE: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
# What llama.cpp takes where a header says nothing.
_DEFAULTS = {"add_bos_token": True, "bos_token_id": 1, "eos_token_id": 2, "add_space_prefix": True}


def from_sentencepiece(metadata: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Make the fields of a tokenizer.json of what a GGUF header says.

    Args:
        metadata: the header's values.
        where: the file, for messages.

    Raises:
        CheckpointError: the lists do not fit together.
    """
    metadata = {PREFIX + name: value for name, value in _DEFAULTS.items()} | dict(metadata)
    tokens = texts_of(metadata, "tokens", where)
    types = types_of(metadata, len(tokens), where)
    vocab = {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}
    if len(vocab) < sum(kind != UNUSED for kind in types):
        refuse_broken(where, "one token stands twice")
    lacking = [byte for byte in _BYTES if byte not in vocab]
    if lacking:
        refuse_broken(where, f"it has no token for the byte {lacking[0]}")
    prefix = bool(metadata[PREFIX + "add_space_prefix"])
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    ]
    steps += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    steps += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    unknown = [token for token, i in vocab.items() if types[i] == UNKNOWN]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(tokens, types),
        "normalizer": {"type": "Sequence", "normalizers": [_PREPEND, _REPLACE]}
        if prefix
        else _REPLACE,
        "pre_tokenizer": None,
        "post_processor": post_processor(metadata, tokens, where),
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": {
            "type": "BPE",
            "unk_token": unknown[0] if unknown else None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": _merges_by_score(metadata, tokens, types, vocab, where),
        },
    }


def _merges_by_score(
    metadata: Mapping[str, Any],
    tokens: list[str],
    types: list[int],
    vocab: Container[str],
    where: str,
) -> list[tuple[str, str]]:
    scores = metadata.get(PREFIX + "scores")
    if not isinstance(scores, tuple) or len(scores) != len(tokens):
        refuse_broken(
            where, f"{PREFIX}scores must have one number for each of {len(tokens)} tokens"
        )
    if not all(isinstance(score, float) and math.isfinite(score) for score in scores):
        refuse_broken(where, f"{PREFIX}scores must be numbers")
    merged = [i for i, kind in enumerate(types) if kind in (NORMAL, BYTE)]
    too_long = next((tokens[i] for i in merged if len(tokens[i]) > _LONGEST), None)
    if too_long is not None:
        refuse_broken(where, f"a token has {len(too_long)} characters, expected {_LONGEST} at most")
    merges: list[tuple[str, str]] = []
    last: int | None = None
    for i in sorted(merged, key=lambda i: -scores[i]):
        splits = list(_splits(tokens[i], vocab))
        if not splits:
            continue
        if last is not None and scores[last] == scores[i]:
            both = f"{shown(tokens[last])} and {shown(tokens[i])}"
            refuse_broken(
                where, f"the tokens {both} have one score, and either may be merged first"
            )
        merges.extend(splits)
        last = i
    return merges


def _splits(token: str, vocab: Container[str]) -> Iterator[tuple[str, str]]:
    """The pairs of tokens that make a token."""
    for cut in range(1, len(token)):
        if token[:cut] in vocab and token[cut:] in vocab:
            yield token[:cut], token[cut:]


def is_sentencepiece(fields: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is of the kind that llama.cpp reads as SentencePiece's.

    Args:
        fields: the tokenizer.json's.

    Example:
        >>> is_sentencepiece({"model": {"type": "BPE", "byte_fallback": False}})
        False
    """
    model = fields["model"]
    changes = ("continuing_subword_prefix", "end_of_word_suffix", "dropout", "ignore_merges")
    return (
        model.get("type") == "BPE"
        and model.get("byte_fallback") is True
        and not any(model.get(name) for name in changes)
        and _space_prefix(fields) is not None
        and all(byte in model["vocab"] for byte in _BYTES)
        and _around(fields) is not None
    )


def _space_prefix(fields: Mapping[str, Any]) -> bool | None:
    """Whether a text gets a space before it; None where a text is changed in another way."""
    normalizer, before = fields.get("normalizer"), fields.get("pre_tokenizer")
    if before is None:
        whole = {"type": "Sequence", "normalizers": [_PREPEND, _REPLACE]}
        return True if normalizer == whole else False if normalizer == _REPLACE else None
    # Metaspace leaves a text alone that begins with a space, and, as "first", what follows a
    # special token. llama.cpp does not, whoever converts the model.
    metaspace = before.get("type") == "Metaspace" and before.get("replacement") == _SPACE
    if normalizer is not None or not metaspace or before.get("split", True):
        return None
    return bool(before.get("prepend_scheme", "always") != "never")


def _around(fields: Mapping[str, Any]) -> dict[str, int] | None:
    """The tokens before ("bos") and behind ("eos") each text; None for other post-processors."""
    rule = fields.get("post_processor")
    if rule is None:
        return {}
    if rule.get("type") != "TemplateProcessing":
        return None
    parts = [next(iter(part.items())) for part in rule["single"]]
    kinds = [kind for kind, _ in parts]
    if kinds.count("Sequence") != 1 or len(kinds) > 3:
        return None
    place = kinds.index("Sequence")
    if place > 1 or len(kinds) - place > 2:
        return None
    names = {
        "bos" if i < place else "eos": part["id"] for i, (_, part) in enumerate(parts) if i != place
    }
    numbers = {name: rule["special_tokens"][token]["ids"] for name, token in names.items()}
    if any(len(ids) != 1 for ids in numbers.values()):
        return None
    return {name: ids[0] for name, ids in numbers.items()}


def to_sentencepiece(
    fields: Mapping[str, Any], tokens: list[str], types: list[int], merges: list[tuple[str, str]]
) -> dict[str, Any] | None:
    """The values of a GGUF header, by their names behind "tokenizer.ggml.".

    Args:
        fields: of a tokenizer.json, for which `is_sentencepiece` holds.
        tokens: by their numbers.
        types: of each token, as in a tokenizer of any kind.
        merges: pairs of tokens, the best first.

    Returns:
        The values; None where the merges are not those that llama.cpp makes.
    """
    ranks, around = _ranks(merges, fields), _around(fields) or {}
    if ranks is None or any(number >= len(tokens) for number in around.values()):
        return None
    unknown = fields["model"].get("unk_token")
    kinds = [
        UNKNOWN if token == unknown else BYTE if kind == NORMAL and token in _OF_BYTES else kind
        for token, kind in zip(tokens, types, strict=True)
    ]
    header: dict[str, Any] = {
        "model": KIND,
        "pre": "default",
        "tokens": tokens,
        "scores": [-float(ranks.get(token, 0)) for token in tokens],
        "token_type": kinds,
        "add_space_prefix": bool(_space_prefix(fields)),
        "add_bos_token": "bos" in around,
        "add_eos_token": "eos" in around,
    }
    if unknown in tokens:
        header["unknown_token_id"] = tokens.index(unknown)
    return header | {f"{name}_token_id": number for name, number in around.items()}


def _ranks(merges: Iterable[tuple[str, str]], fields: Mapping[str, Any]) -> dict[str, int] | None:
    """The place of each token in the order of merges, if they have all ways to each of them."""
    by_token: dict[str, set[tuple[str, str]]] = {}
    last = None
    for left, right in merges:
        token = left + right
        if token != last and token in by_token:
            return None  # another token's merges come between
        by_token.setdefault(token, set()).add((left, right))
        last = token
    added = {token["content"] for token in fields.get("added_tokens") or ()}
    vocab = fields["model"]["vocab"].keys() - added  # added ones are found before any merge
    for token in vocab:
        if len(token) > _LONGEST or not set(_splits(token, vocab)) <= by_token.get(token, set()):
            return None
    return {token: rank for rank, token in enumerate(by_token, 1)}
