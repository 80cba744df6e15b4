"""Anthropic's messages and tools, as templates take them."""

from __future__ import annotations

import json
from typing import Any, Literal

from anymamba.runtime.chat.model_template import Message
from anymamba.runtime.chat.tool_grammar import ToolUse
from anymamba.runtime.chat.tools import Tool
from anymamba.server.chats.tool_fields import (
    MOST_TOOLS,
    call_of,
    name_of,
    tool_of,
    tool_use,
    with_names,
)
from anymamba.server.chats.turn import MOST_MESSAGES
from anymamba.server.errors import ApiError
from anymamba.server.fields import Fields

_MOST_BLOCKS = 10_000
_MODES: dict[str, Literal["none", "auto", "required"]] = {
    "auto": "auto",
    "any": "required",
    "tool": "required",
    "none": "none",
}


def messages_of(fields: Fields) -> tuple[list[Message], str]:
    """What was said, and how the answer begins: what the last message says, if the assistant's.

    Raises:
        ApiError: a field has a value that makes no sense, or a block is of another type.
    """
    system = _system(fields)
    fields.require("messages", "a list of messages")
    said: list[Message] = [{"role": "system", "content": system}] if system else []
    given = fields.objects("messages", MOST_MESSAGES)
    if not given:
        raise fields.refuse("messages", [], "one message or more")
    for message in given:
        for turn in _turns(message):
            _join(said, turn)
    beginning = ""
    if said[-1]["role"] == "assistant":
        last = said.pop()
        beginning = last["content"]
        if "tool_calls" in last or beginning != beginning.rstrip():
            expected = "text without spaces at its end"
            raise ApiError(400, f"messages end with the assistant, expected {expected}", "messages")
    return with_names(said, "messages"), beginning


def _system(fields: Fields) -> str:
    if isinstance(fields.peek("system"), str):
        return fields.text("system") or ""
    return "".join(_text(block) for block in fields.objects("system", _MOST_BLOCKS))


def _join(said: list[Message], turn: Message) -> None:
    """Add to what was said; what one says in several messages is one turn."""
    is_more = said and said[-1]["role"] == turn["role"] and turn["role"] != "tool"
    if not is_more or "tool_calls" in said[-1]:
        said.append(turn)
        return
    texts = [text for text in (said[-1]["content"], turn["content"]) if text]
    said[-1] = {**said[-1], **turn, "content": "\n".join(texts)}


def _turns(fields: Fields) -> list[Message]:
    """A message, whose results of tools come before what the user says."""
    fields.require("role", "who says it")
    role = fields.choice("role", ("user", "assistant", "system")) or ""
    fields.require("content", "a text or a list of blocks")
    texts, calls, results = [], [], []
    if isinstance(fields.peek("content"), str):
        texts = [fields.text("content") or ""]
    else:
        for block in fields.objects("content", _MOST_BLOCKS):
            kind = block.peek("type")
            if kind == "tool_use" and role == "assistant":
                calls.append(_call(block))
            elif kind == "tool_result" and role == "user":
                results.append(_result(block))
            else:
                texts.append(_text(block))
    fields.done()
    said: Message = {"role": role, "content": "".join(texts)}
    if calls:
        said["tool_calls"] = calls
    return [*results, said] if texts or not results else results


def _text(block: Fields) -> str:
    kind = block.take("type")
    if kind != "text":
        raise block.refuse("type", kind, "'text', the only kind of block that is supported here")
    block.require("text", "a text")
    text = block.text("text") or ""
    block.only("citations", [], "the models cite nothing")
    block.inner("cache_control")  # all is kept for the next time anyway
    block.done()
    return text


def _call(block: Fields) -> dict[str, Any]:
    block.take("type")
    for name, expected in (("id", "the call's id"), ("input", "an object")):
        block.require(name, expected)
    id, name = block.text("id") or "", name_of(block)
    arguments = block.take("input")
    if not isinstance(arguments, dict):
        raise block.refuse("input", arguments, "an object")
    block.inner("cache_control")
    block.done()
    return call_of(id, name, arguments)


def _result(block: Fields) -> Message:
    block.take("type")
    block.require("tool_use_id", "the id of the call whose result this is")
    id = block.text("tool_use_id") or ""
    if isinstance(block.peek("content"), str):
        content = block.text("content") or ""
    else:
        content = "".join(_text(part) for part in block.objects("content", _MOST_BLOCKS))
    if block.flag("is_error"):
        content = json.dumps({"error": content}, ensure_ascii=False)
    block.inner("cache_control")
    block.done()
    return {"role": "tool", "tool_call_id": id, "content": content}


def tool_use_of(fields: Fields) -> ToolUse | None:
    """The tools of a request, and how they may be used."""
    tools = [_tool(tool) for tool in fields.objects("tools", MOST_TOOLS)]
    mode, only, parallel = None, None, True
    if (choice := fields.inner("tool_choice")) is not None:
        expected = " or ".join(map(repr, _MODES))
        choice.require("type", expected)
        kind = choice.choice("type", tuple(_MODES)) or ""
        mode, parallel = _MODES[kind], not choice.flag("disable_parallel_tool_use")
        only = name_of(choice) if kind == "tool" else None
        choice.done()
    return tool_use(tools, mode, only, parallel)


def _tool(fields: Fields) -> Tool:
    fields.only("type", "custom", "the server has no tools of its own: describe yours")
    fields.inner("cache_control")
    fields.require("input_schema", "a JSON schema of the arguments")
    tool = tool_of(fields, "input_schema")
    fields.done()
    return tool
