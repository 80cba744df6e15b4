"""Texts as the tokens that a state is to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from anymamba.checkpoint.io import shown
from anymamba.errors import InputError
from anymamba.runtime.state import State
from anymamba.runtime.tokenizer import TextCodec, as_token_ids, check_vocabulary

Text: TypeAlias = str | Sequence[int]
"""A text, or its tokens."""


def ids_to_read(text: Text, codec: TextCodec, state: State) -> NDArray[np.int64]:
    """The tokens of what a state is to read next, with special ones at the first text's borders.

    Example:
        >>> import anymamba
        >>> engine = anymamba.load()
        >>> ids_to_read([72, 105], TextCodec(None), engine.state()).tolist()
        [72, 105]
    """
    if isinstance(text, str):
        return np.array(codec.encode(text, special=state.token_count == 0), np.int64)
    ids = as_token_ids(text)
    if ids.dtype.kind == "u":  # the largest would be others after the conversion
        check_vocabulary(ids, state.identity.vocabulary, "the text")
    return ids.astype(np.int64)


def first_ids(config: Mapping[str, Any], state: State) -> NDArray[np.int64]:
    """What is read of an empty prompt: nothing, or the token for the beginning of a text.

    Raises:
        InputError: there is nothing to continue.
    """
    if state.logits is not None:
        return np.empty(0, np.int64)
    if state.token_count:
        raise InputError(
            "the prompt is empty, and the state does not say which token comes next (one from "
            "a MambaCache never does): give at least one token"
        )
    first = config.get("bos_token_id", 0)  # Transformers' default
    if type(first) is not int or not 0 <= first < state.identity.vocabulary:
        raise InputError(
            "the prompt is empty, and this model has no token for the beginning of a text: "
            "give at least one character"
        )
    return np.array([first])


def as_list(prompts: Sequence[Text]) -> list[Text]:
    """Several prompts.

    Raises:
        InputError: this is one text, or no list.
    """
    if isinstance(prompts, str):
        raise InputError("prompts is one text, expected several: give a list")
    try:
        return list(prompts)
    except TypeError:
        raise InputError(f"prompts must be a list of texts, got {shown(prompts)}") from None
