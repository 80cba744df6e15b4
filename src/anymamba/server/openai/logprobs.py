"""Log-probabilities of tokens in OpenAI's two forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from anymamba.errors import NoTokenizerError
from anymamba.runtime.engine import Engine
from anymamba.runtime.generation import PromptScores, StreamingDetokenizer, TokenOutput
from anymamba.runtime.generation.token_generator import TopLogprobs
from anymamba.runtime.token_bytes import token_bytes

_UNKNOWN = "\ufffd"


def of_completion(
    engine: Engine, pieces: Sequence[TokenOutput], offset: int = 0
) -> dict[str, list[Any]]:
    """As /v1/completions has them: lists side by side."""
    tokens = [_text(engine, piece.ids[0]) for piece in pieces]
    offsets = []
    for piece in pieces:
        offsets.append(offset)
        offset += len(piece.text)
    return {
        "tokens": tokens,
        "token_logprobs": [piece.logprob for piece in pieces],
        "top_logprobs": [
            None if piece.logprob is None else _by_text(engine, piece.top_logprobs)
            for piece in pieces
        ],
        "text_offset": offsets,
    }


def of_prompt(engine: Engine, ids: Sequence[int], scores: PromptScores) -> list[TokenOutput]:
    """A prompt's tokens as if they were written: with their text and log-probabilities."""
    stream = StreamingDetokenizer(engine.detokenize if _has_text(engine) else lambda ids: "", ())
    pieces = [
        TokenOutput(stream.add(id), (id,), logprob, top)
        for id, logprob, top in zip(ids, scores.logprobs, scores.top, strict=True)
    ]
    if pieces:
        pieces[-1] = replace(pieces[-1], text=pieces[-1].text + stream.finish())
    return pieces


def _text(engine: Engine, id: int) -> str:
    """A token's text, or its number where the model has no tokenizer."""
    return engine.detokenize([id], skip_special=False) if _has_text(engine) else f"token_id:{id}"


def _has_text(engine: Engine) -> bool:
    try:
        engine.tokenizer  # noqa: B018
    except NoTokenizerError:
        return False
    return True


def _by_text(engine: Engine, likeliest: TopLogprobs) -> dict[str, float]:
    """Log-probabilities by the tokens' texts; where two have the same, by "token_id:" for one."""
    found: dict[str, float] = {}
    for id, logprob in likeliest:
        text = _text(engine, id)
        found[f"token_id:{id}" if text in found else text] = logprob
    return found


def of_chat(engine: Engine, pieces: Sequence[TokenOutput]) -> dict[str, Any]:
    """As /v1/chat/completions has them: one object a token."""
    return {
        "content": [
            {
                **_token(engine, piece.ids[0], piece.logprob),
                "top_logprobs": [_token(engine, id, logprob) for id, logprob in piece.top_logprobs],
            }
            for piece in pieces
        ]
    }


def _token(engine: Engine, id: int, logprob: float | None) -> dict[str, Any]:
    text = _text(engine, id)
    # A part of a character has no text that says which.
    found = token_bytes(engine.tokenizer, id) if _UNKNOWN in text else text.encode()
    return {"token": text, "logprob": logprob, "bytes": None if found is None else list(found)}
