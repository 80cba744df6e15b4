"""What settings of a request become: how tokens are chosen, within limits, in a form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from anymamba.errors import InputError
from anymamba.runtime.chat.tool_grammar import ToolUse, constraint_of
from anymamba.runtime.generation import Sampling
from anymamba.runtime.generation.grammar import Constraint
from anymamba.server.errors import ApiError
from anymamba.server.fields import Fields
from anymamba.server.service import Service

MOST_STOPS = 4
Schema = Mapping[str, Any] | bool


def sampling_from(settings: dict[str, Any]) -> Sampling:
    """Make settings of those that a request names.

    Raises:
        ApiError: they make no sense.
    """
    temperature = settings.get("temperature")
    if temperature is not None and 0 < temperature < 1e-6:
        settings["temperature"] = 0.0
    for name in ("top_p", "typical_p"):
        if settings.get(name) == 0:  # the likeliest alone, as with OpenAI
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


def json_schema_of(described: Fields) -> Schema:
    """The schema of a described form, whose other fields change nothing: it is enforced."""
    described.text("name")
    described.text("description")
    described.flag("strict")
    described.require("schema", "a JSON schema")
    schema = described.take("schema")
    if not isinstance(schema, dict | bool):
        raise described.refuse("schema", schema, "a JSON schema")
    return schema


def enforced(
    service: Service,
    model: str,
    sampling: Sampling,
    schema: Schema | None,
    tools: ToolUse | None = None,
    param: str = "response_format",
) -> Sampling:
    """The settings with a form of the text enforced, and that of calls of tools.

    Args:
        service: has the model's grammars.
        model: its name.
        sampling: the settings without it.
        schema: what the text must be; None for any text.
        tools: what may be called.
        param: the field that asks for the schema.

    Raises:
        ApiError: it cannot be enforced.
    """
    if schema is None and tools is None:
        return sampling
    param = "tools" if schema is None else param
    grammars = service.grammars(model, param)
    try:
        if tools is None:
            constraint = grammars.json(schema)
        else:
            constraint = constraint_of(tools, grammars, schema)
        stops = (*sampling.stop_ids, *grammars.end_ids)
    except InputError as error:
        param = "tools" if str(error).startswith("tool ") else param
        raise ApiError(400, str(error), param) from error
    return replace(sampling, constraint=constraint, stop_ids=stops)


def for_row(sampling: Sampling) -> Sampling:
    """The settings for one of several answers: a constraint belongs to one text."""
    if isinstance(sampling.constraint, Constraint):
        return replace(sampling, constraint=sampling.constraint.fresh())
    return sampling


def stops_of(fields: Fields, name: str, most: int = MOST_STOPS) -> list[str]:
    """The texts at which an answer ends."""
    given = fields.take(name, [])
    stops = [given] if isinstance(given, str) else given
    fits = (
        isinstance(stops, list)
        and len(stops) <= most
        and all(isinstance(stop, str) and 0 < len(stop) <= 1000 for stop in stops)
    )
    if not fits:
        raise fields.refuse(name, given, f"a string, or at most {most} of them, none empty")
    return list(stops)
