"""A field that holds a text, its tokens, or several of either."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from anymamba.errors import AnyMambaError
from anymamba.runtime.engine import Engine
from anymamba.runtime.state import State
from anymamba.server.errors import ApiError, as_api_error
from anymamba.server.fields import Fields


def texts_of(
    fields: Fields, name: str, most: int, engine: Engine, state: State | None = None
) -> list[NDArray[np.int64]]:
    """The tokens of each text.

    Args:
        fields: the request's; this one is taken out.
        name: of the field.
        most: how many texts there may be.
        engine: makes tokens of texts.
        state: what they continue from.

    Raises:
        ApiError: it is none of these, or a token is none of the model's.
    """
    given = fields.take(name)
    is_one = isinstance(given, str) or (
        isinstance(given, list) and bool(given) and all(type(token) is int for token in given)
    )
    texts = [given] if is_one else given
    if not isinstance(texts, list) or not 0 < len(texts) <= most:
        raise fields.refuse(name, given, f"a text, its tokens, or up to {most} of them")
    for text in texts:
        tokens = isinstance(text, list) and all(
            type(token) is int and 0 <= token < 1 << 31 for token in text
        )
        if not (isinstance(text, str) or tokens):
            raise fields.refuse(name, text, "a text or a list of tokens")
    try:
        return [engine.prompt_ids(text, state) for text in texts]
    except AnyMambaError as error:
        raise ApiError(as_api_error(error).status, str(error), name) from error
