"""Letting a model write: the call, what listens to it, and what it came to."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from anymamba.cli.text_stream import TextStream

if TYPE_CHECKING:
    import torch

    from anymamba import MambaForCausalLM

__all__ = ["Continuation", "continue_text"]


@dataclass(frozen=True)
class Continuation:
    """What a model wrote, and how long it took."""

    tokens: list[int]
    ended_by: str
    prompt_seconds: float
    new_seconds: float


class Listener:
    """Hands each new token to a text stream, and says when the text has come to a stop string.

    To `generate` of Transformers it is a stopping criterion. A streamer would be told of a token
    only after the decision whether to stop, one token too late for a stop string.
    """

    def __init__(self, stream: TextStream) -> None:
        self.first_token_at: float | None = None
        self._stream = stream

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        """Receive all tokens there are, the newest last; return whether to stop."""
        import torch

        if self.first_token_at is None:
            self.first_token_at = time.perf_counter()
        self._stream.add(int(input_ids[0, -1]))
        return input_ids.new_full((1,), self._stream.stopped, dtype=torch.bool)


def continue_text(
    model: MambaForCausalLM,
    prompt_tokens: Sequence[int],
    stream: TextStream,
    arguments: argparse.Namespace,
) -> Continuation:
    """Let the model write into the stream until a limit, a stop string or its end token."""
    import torch
    from transformers import StoppingCriteriaList

    torch.manual_seed(arguments.seed)
    listener = Listener(stream)
    prompt_ids = torch.tensor([list(prompt_tokens)], device=model.device)
    start = time.perf_counter()
    # Transformers' annotations deny this method to every model but its own.
    output = cast(Any, model).generate(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        max_new_tokens=arguments.max_new_tokens,
        repetition_penalty=arguments.repetition_penalty,
        stopping_criteria=StoppingCriteriaList([listener]),
        **sampling(arguments),
    )
    stream.finish()
    tokens = output[0, len(prompt_tokens) :].tolist()
    end = time.perf_counter()
    first = listener.first_token_at or end
    return Continuation(tokens, ending(model, tokens, stream), first - start, end - first)


def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that say how to choose a token, as `generate` of Transformers names them."""
    if arguments.temperature == 0:
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": arguments.temperature,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "min_p": arguments.min_p,
    }


def ending(model: MambaForCausalLM, tokens: Sequence[int], stream: TextStream) -> str:
    """What ended the text: a stop string ("stop"), the model's end token ("end"), or "length"."""
    if stream.stopped:
        return "stop"
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return "end" if tokens[-1] in ends else "length"
