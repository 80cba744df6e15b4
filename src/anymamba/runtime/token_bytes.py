"""The bytes that a token stands for, also where they are only a part of a character."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def token_bytes(tokenizer: Tokenizer, id: int) -> bytes | None:
    """The bytes of a token of a vocabulary of bytes, or of one that falls back to them.

    Args:
        tokenizer: the model's.
        id: the token.

    Returns:
        The bytes; None where the tokenizer does not say: there is no such token, or it is written
        in another way.

    Example:
        >>> import anymamba
        >>> tokenizer = anymamba.load().tokenizer
        >>> [token_bytes(tokenizer, id) for id in tokenizer.encode("é").ids]
        [b'\\xc3', b'\\xa9']
    """
    token = tokenizer.id_to_token(id)
    if token is None or tokenizer.decoder is None:
        return None
    kinds = json.loads(tokenizer.decoder.__getstate__())
    kinds = {decoder["type"] for decoder in kinds.get("decoders", [kinds])}
    if "ByteLevel" in kinds and all(character in _byte_of() for character in token):
        return bytes(_byte_of()[character] for character in token)
    if "ByteFallback" in kinds and (found := _BYTE.fullmatch(token)):
        return bytes([int(found[1], 16)])
    return None


@cache
def _byte_of() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the others follow 255."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): b for i, b in enumerate(others)}
