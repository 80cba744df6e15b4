"""How a request wants its tokens chosen, by OpenAI's names and a few of ours."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from anymamba.errors import InputError
from anymamba.runtime.generation import Sampling
from anymamba.runtime.generation.grammar import Constraint, Grammars
from anymamba.server.errors import ApiError
from anymamba.server.fields import Fields

MOST_STOPS = 4
MOST_CHOICES = 128


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
        "stop": _stops(fields),
        "max_new_tokens": max_tokens,
        "top_logprobs": top_logprobs,
    }
    if settings["seed"] is not None:
        settings["seed"] %= 1 << 63  # OpenAI takes negative ones too
    if settings["temperature"] is not None and 0 < settings["temperature"] < 1e-6:
        settings["temperature"] = 0.0
    for name in ("top_p", "typical_p"):
        if settings[name] == 0:  # the likeliest alone, as with OpenAI
            settings[name], settings["temperature"] = None, 0.0
    try:
        return Sampling(**settings)
    except InputError as error:
        raise ApiError(400, str(error), str(error).split(" ", 1)[0]) from error


def check_size(most: int, answers: int, sampling: Sampling) -> None:
    """Refuse a request for more tokens than allowed, all its answers together.

    Raises:
        ApiError: it asks for more.
    """
    tokens = answers * (sampling.max_new_tokens or 0) * (1 + (sampling.top_logprobs or 0))
    if tokens > most:
        raise ApiError(
            400,
            f"n times max_tokens, with the alternatives of logprobs, is {tokens}, expected at most "
            f"{most}: ask for fewer",
            "max_tokens",
        )


def constrained(sampling: Sampling, given: Fields, grammars: Grammars) -> Sampling:
    """The settings with OpenAI's `response_format` enforced.

    Args:
        sampling: the settings without it.
        given: the field's object.
        grammars: of the model.

    Raises:
        ApiError: it is none of "text", "json_object" and "json_schema", or cannot be enforced.
    """
    given.require("type", "'text', 'json_object' or 'json_schema'")
    name = given.choice("type", ("text", "json_object", "json_schema"))
    schema: object = None
    if name == "json_schema":
        described = given.inner("json_schema")
        if described is None:
            raise ApiError(400, "response_format.json_schema is missing", "response_format")
        described.text("name")
        described.text("description")
        described.flag("strict")  # a schema is always enforced
        described.require("schema", "a JSON schema")
        schema = described.take("schema")
        if not isinstance(schema, dict | bool):
            raise described.refuse("schema", schema, "a JSON schema")
        described.done()
    given.done()
    if name == "text":
        return sampling
    try:
        constraint = grammars.json(schema)  # type: ignore[arg-type]
        stops = (*sampling.stop_ids, *grammars.end_ids)
    except InputError as error:
        raise ApiError(400, str(error), "response_format") from error
    return replace(sampling, constraint=constraint, stop_ids=stops)


def streaming_of(fields: Fields) -> tuple[bool, bool]:
    """Whether the answer is to be streamed, and whether the stream tells its usage at the end."""
    streams, options = fields.flag("stream"), fields.inner("stream_options")
    if options is None:
        return streams, False
    with_usage = options.flag("include_usage")
    options.done()
    return streams, with_usage


def for_row(sampling: Sampling) -> Sampling:
    """The settings for one of several answers: a constraint belongs to one text."""
    if isinstance(sampling.constraint, Constraint):
        return replace(sampling, constraint=sampling.constraint.fresh())
    return sampling


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


def _stops(fields: Fields) -> list[str]:
    given = fields.take("stop", [])
    stops = [given] if isinstance(given, str) else given
    fits = (
        isinstance(stops, list)
        and len(stops) <= MOST_STOPS
        and all(isinstance(stop, str) and 0 < len(stop) <= 1000 for stop in stops)
    )
    if not fits:
        raise fields.refuse("stop", given, f"a string, or at most {MOST_STOPS} of them, none empty")
    return list(stops)
