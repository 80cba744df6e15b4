"""How a request wants its tokens chosen, by OpenAI's names and a few of ours."""

from __future__ import annotations

from typing import Any

from anymamba.runtime.generation import Sampling
from anymamba.server.answers import Usage
from anymamba.server.fields import Fields
from anymamba.server.sampling import Schema, json_schema_of, sampling_from, stops_of

MOST_CHOICES = 128
FINISH_REASONS = {
    "eos": "stop",
    "stop": "stop",
    "length": "length",
    "calls": "tool_calls",
    None: None,
}
"""OpenAI's words for why an answer has ended."""


def sampling_of(fields: Fields, max_tokens: int, top_logprobs: int | None) -> Sampling:
    """Read what `Sampling` is made of.

    Args:
        fields: the request's; these are taken out.
        max_tokens: how many tokens are asked for.
        top_logprobs: as `Sampling` has it.

    Raises:
        ApiError: a field has a value that makes no sense.
    """
    settings: dict[str, Any] = {
        "temperature": fields.number("temperature", 0, 2, 1.0),
        "top_p": fields.number("top_p", 0, 1),
        "top_k": fields.integer("top_k", 0, 1 << 31),
        "min_p": fields.number("min_p", 0, 1),
        "typical_p": fields.number("typical_p", 0, 1),
        "presence_penalty": fields.number("presence_penalty", -2, 2, 0.0),
        "frequency_penalty": fields.number("frequency_penalty", -2, 2, 0.0),
        "repetition_penalty": fields.number("repetition_penalty", 0.01, 100, 1.0),
        "seed": fields.integer("seed", -(1 << 63), (1 << 63) - 1),
        "logit_bias": _bias(fields),
        "stop": stops_of(fields, "stop"),
        "max_new_tokens": max_tokens,
        "top_logprobs": top_logprobs,
    }
    if settings["seed"] is not None:
        settings["seed"] %= 1 << 63  # OpenAI takes negative ones too
    return sampling_from(settings)


def schema_of(given: Fields | None) -> Schema | None:
    """The JSON schema that `response_format` asks for; None where any text will do.

    Raises:
        ApiError: it is none of "text", "json_object" and "json_schema".
    """
    if given is not None and given.peek("type") == "json_schema":
        given.take("type")
        given.require("json_schema", "a name and a schema")
        described = given.inner("json_schema")
        assert described is not None
        schema = json_schema_of(described)
        described.done()
        given.done()
        return schema
    return form_of(given)


def form_of(given: Fields | None) -> Schema | None:
    """The same of `text.format`, which has the schema in itself.

    Raises:
        ApiError: it is none of "text", "json_object" and "json_schema".
    """
    schema: Schema | None = None
    if given is None:
        return schema
    name = given.take("type")
    if name == "json_schema":
        schema = json_schema_of(given)
    elif name in ("text", "json_object"):
        schema = {"type": "object"} if name == "json_object" else None
    else:
        raise given.refuse("type", name, "'text', 'json_object' or 'json_schema'")
    given.done()
    return schema


def usage_body(usage: Usage) -> dict[str, object]:
    """How many tokens were read and written, as completions and chats tell it."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


def streaming_of(fields: Fields) -> tuple[bool, bool]:
    """Whether the answer is to be streamed, and whether the stream tells its usage at the end."""
    streams, options = fields.flag("stream"), fields.inner("stream_options")
    if options is None:
        return streams, False
    with_usage = options.flag("include_usage")
    options.done()
    return streams, with_usage


def _bias(fields: Fields) -> dict[int, float]:
    given = fields.take("logit_bias", {})
    if not isinstance(given, dict) or len(given) > 1024:
        raise fields.refuse("logit_bias", given, "an object of at most 1024 tokens and numbers")
    bias = {}
    for token, value in given.items():
        is_token = token.isascii() and token.isdigit() and len(token) < 10
        if not is_token or type(value) not in (int, float) or not -100 <= value <= 100:
            expected = "an object of tokens' numbers and what is added to them, -100 to 100"
            raise fields.refuse("logit_bias", {token: value}, expected)
        bias[int(token)] = float(value)
    return bias
