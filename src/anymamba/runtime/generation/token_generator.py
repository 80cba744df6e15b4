"""Choosing the tokens of one text, and saying when it ends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from anymamba.renamed import warn_renamed
from anymamba.runtime.generation.detokenizer import StreamingDetokenizer
from anymamba.runtime.generation.sampling import Sampler
from anymamba.runtime.generation.sampling_settings import Sampling

FinishReason = Literal["length", "stop", "eos"]
"""What ended a text: the number of tokens asked for, a stop string, or an end token."""

# As release 0.1 called them.
_STOPPED_BY: dict[str, str] = {"eos": "end"}

TopLogprobs = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class TokenOutput:
    """What one new token brings.

    Args:
        text: the text that is certain now; often empty, where a character is not whole yet, or
            what may become a stop string is held back.
        ids: the token, one.
        logprob: its log-probability, if the settings ask for it.
        top_logprobs: the likeliest tokens and theirs, if the settings ask for them.
        finish_reason: on the last piece, what ended the text.
        stop_string: on the last piece, the stop string that ended it, if one did.
    """

    text: str
    ids: tuple[int, ...]
    logprob: float | None = None
    top_logprobs: TopLogprobs = ()
    finish_reason: FinishReason | None = None
    stop_string: str | None = None

    @property
    def stopped_by(self) -> str | None:
        """The name of `finish_reason` in release 0.1, where "eos" was "end"."""
        return _stopped_by("TokenOutput", self.finish_reason)


@dataclass(frozen=True)
class GenerationOutput:
    """What a model wrote.

    Args:
        text: the new text, without the prompt, and up to a stop string.
        ids: the new tokens, those of a stop string and an end token among them.
        finish_reason: "length", "stop" (a stop string) or "eos" (an end token).
        prompt_ids: the tokens that were read before.
        logprobs: of each new token, if the settings ask for them.
        top_logprobs: for each new token the likeliest and theirs, if the settings ask for them.
    """

    text: str
    ids: list[int]
    finish_reason: FinishReason
    prompt_ids: list[int]
    logprobs: list[float] | None = None
    top_logprobs: list[TopLogprobs] | None = None

    @property
    def stopped_by(self) -> str | None:
        """The name of `finish_reason` in release 0.1, where "eos" was "end"."""
        return _stopped_by("GenerationOutput", self.finish_reason)

    @classmethod
    def of(
        cls, pieces: Sequence[TokenOutput], prompt_ids: list[int], sampling: Sampling
    ) -> GenerationOutput:
        """Put pieces together.

        Example:
            >>> pieces = [TokenOutput("a", (1,)), TokenOutput("b", (2,), finish_reason="length")]
            >>> GenerationOutput.of(pieces, [], Sampling()).text
            'ab'
        """
        wanted = sampling.top_logprobs
        logprobs = [piece.logprob for piece in pieces if piece.logprob is not None]
        return cls(
            text="".join(piece.text for piece in pieces),
            ids=[id for piece in pieces for id in piece.ids],
            finish_reason=pieces[-1].finish_reason or "length",
            prompt_ids=prompt_ids,
            logprobs=None if wanted is None else logprobs,
            top_logprobs=[piece.top_logprobs for piece in pieces] if wanted else None,
        )


def _stopped_by(owner: str, finish_reason: FinishReason | None) -> str | None:
    warn_renamed(f"{owner}.stopped_by", f"{owner}.finish_reason, whose 'eos' was 'end'")
    return finish_reason and _STOPPED_BY.get(finish_reason, finish_reason)


class TokenGenerator:
    """Chooses the tokens of one text, and says when it ends.

    Args:
        sampler: chooses.
        detokenize: makes text of tokens.
        end_ids: the tokens that end a text; they have no text.
    """

    def __init__(
        self, sampler: Sampler, detokenize: Callable[[Sequence[int]], str], end_ids: Collection[int]
    ) -> None:
        self.finish_reason: FinishReason | None = None
        self._sampler = sampler
        self._stream = StreamingDetokenizer(detokenize, sampler.sampling.stop)
        self._end_ids = {*end_ids, *sampler.sampling.stop_ids}
        self._left = sampler.sampling.max_new_tokens

    def write(self, logits_v: np.ndarray) -> TokenOutput:
        """Choose the next token by the logits after all before it."""
        chosen = self._sampler.next(logits_v)
        self._left -= 1
        ended = chosen.id in self._end_ids
        text = "" if ended else self._stream.add(chosen.id)
        if ended:
            self.finish_reason = "eos"
        elif self._left == 0 and self._stream.stop_string is None:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            text += self._stream.finish()
        if self._stream.stop_string is not None:  # finishing may show one too
            self.finish_reason = "stop"
        return TokenOutput(
            text,
            (chosen.id,),
            chosen.logprob,
            chosen.top,
            self.finish_reason,
            self._stream.stop_string,
        )
