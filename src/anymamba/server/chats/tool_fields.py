"""Tools in a request, in what the interfaces have in common."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from anymamba.checkpoint.io import shown
from anymamba.runtime.chat.model_template import Message
from anymamba.runtime.chat.tool_grammar import ToolUse
from anymamba.runtime.chat.tools import Tool
from anymamba.server.errors import ApiError
from anymamba.server.fields import Fields

MOST_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")
_NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


def tool_of(fields: Fields, schema: str = "parameters") -> Tool:
    """A tool: its name, description, and schema in the field of that name.

    Raises:
        ApiError: the name is none, or the schema is not that of an object.
    """
    name = name_of(fields)
    description = fields.text("description")
    fields.flag("strict")  # a schema is always enforced
    given = fields.take(schema, _NOTHING)
    if not isinstance(given, dict) or given.get("type", "object") != "object":
        expected = f"a JSON schema whose type is 'object', the arguments of tool {name!r}"
        raise fields.refuse(schema, given, expected)
    return Tool(name, {"type": "object", **given}, description)


def name_of(fields: Fields) -> str:
    """The name of a tool."""
    expected = "a name of at most 128 letters, digits, '_' and '-'"
    fields.require("name", expected)
    name = fields.take("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise fields.refuse("name", name, expected)
    return name


def tool_use(
    tools: Sequence[Tool],
    mode: Literal["none", "auto", "required"] | None,
    only: str | None,
    parallel: bool,
) -> ToolUse | None:
    """The tools of a request and how they may be used; None where it has none.

    Raises:
        ApiError: it asks for one that is not there, or two have the same name.
    """
    names = [tool.name for tool in tools]
    for name in names:
        if names.count(name) > 1:
            raise ApiError(400, f"two tools have the name {name!r}: give each its own", "tools")
    if only is not None and only not in names:
        message = f"tool_choice names {shown(only)}, which is not one of the tools {names}"
        raise ApiError(400, message[:500], "tool_choice")
    if not tools and mode == "required":
        raise ApiError(400, "tool_choice needs tools, and there are none", "tool_choice")
    return ToolUse(tuple(tools), mode or "auto", only, parallel) if tools else None


def arguments_of(fields: Fields, name: str) -> dict[str, Any]:
    """The arguments of an earlier call, which are JSON in a string.

    Raises:
        ApiError: they are not.
    """
    fields.require(name, "the call's arguments, a JSON object in a string")
    given = fields.text(name) or ""
    try:
        found = json.loads(given or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise fields.refuse(name, given, "a JSON object in a string")
    return found


def call_of(id: str, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """An earlier call as a message of the assistant has it."""
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def with_names(messages: Sequence[Message], param: str) -> list[Message]:
    """The messages, with results of calls named after what was called.

    Raises:
        ApiError: a result belongs to no call before it.
    """
    called: dict[str, str] = {}
    named = []
    for message in messages:
        for call in message.get("tool_calls", ()):
            called[call["id"]] = call["function"]["name"]
        if message["role"] == "tool":
            id = message["tool_call_id"]
            if id not in called:
                raise ApiError(400, f"{shown(id)} is the id of no tool call before it", param)
            message = {**message, "name": called[id]}
        named.append(message)
    return named
