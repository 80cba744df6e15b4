"""The items of `/v1/responses` as messages that templates take."""

from __future__ import annotations

from typing import Any

from anymamba.runtime.chat.model_template import Message
from anymamba.runtime.chat.tool_grammar import ToolUse
from anymamba.runtime.chat.tools import Tool
from anymamba.server.chats.tool_fields import (
    MOST_TOOLS,
    arguments_of,
    call_of,
    name_of,
    tool_of,
    tool_use,
)
from anymamba.server.chats.turn import MOST_MESSAGES
from anymamba.server.fields import Fields
from anymamba.server.openai.chat import text_of, tool_choice_of

_ROLES = ("system", "developer", "user", "assistant")
_STATUSES = ("in_progress", "completed", "incomplete")


def input_of(fields: Fields) -> list[Message]:
    """What is said now: a text, or items.

    Raises:
        ApiError: it has another form, or an item is of another type.
    """
    fields.require("input", "a text or a list of items")
    if isinstance(fields.peek("input"), str):
        return [{"role": "user", "content": fields.text("input")}]
    said: list[Message] = []
    for item in fields.objects("input", MOST_MESSAGES):
        kind = item.take("type", "message")
        if kind == "message":
            said.append(_message(item))
        elif kind == "function_call":
            _add_call(said, _call(item))
        elif kind == "function_call_output":
            said.append(_output(item))
        else:
            expected = "'message', 'function_call' or 'function_call_output'"
            raise item.refuse("type", kind, expected)
        item.text("id")
        item.choice("status", _STATUSES)
        item.done()
    return said


def _message(item: Fields) -> Message:
    item.require("role", "who says it")
    role = item.choice("role", _ROLES) or ""
    item.require("content", "a text, or a list of parts that are texts")
    kinds = ("output_text", "input_text") if role == "assistant" else ("input_text",)
    content = text_of(item, "content", kinds)
    return {"role": "system" if role == "developer" else role, "content": content}


def _call(item: Fields) -> dict[str, Any]:
    item.require("call_id", "the call's id")
    id, name = item.text("call_id") or "", name_of(item)
    return call_of(id, name, arguments_of(item, "arguments"))


def _add_call(said: list[Message], call: dict[str, Any]) -> None:
    """Add a call to what the assistant says: text and calls are one turn."""
    if not said or said[-1]["role"] != "assistant":
        said.append({"role": "assistant", "content": ""})
    said[-1] = {**said[-1], "tool_calls": [*said[-1].get("tool_calls", ()), call]}


def _output(item: Fields) -> Message:
    item.require("call_id", "the id of the call whose result this is")
    item.require("output", "a text, or a list of parts that are texts")
    id = item.text("call_id") or ""
    return {"role": "tool", "tool_call_id": id, "content": text_of(item, "output", ("input_text",))}


def tool_use_of(fields: Fields) -> ToolUse | None:
    """The tools of a request, and how they may be used."""
    tools = [_tool(tool) for tool in fields.objects("tools", MOST_TOOLS)]
    mode, only = tool_choice_of(fields, _chosen)
    return tool_use(tools, mode, only, fields.flag("parallel_tool_calls", True))


def _tool(fields: Fields) -> Tool:
    _check_type(fields)
    tool = tool_of(fields)
    fields.done()
    return tool


def _chosen(fields: Fields) -> str:
    _check_type(fields)
    return name_of(fields)


def _check_type(fields: Fields) -> None:
    kind = fields.take("type")
    if kind != "function":
        raise fields.refuse("type", kind, "'function': the server has no tools of its own")
