"""What a model may write where there are tools: text, and calls that fit their schemas."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from anymamba.errors import InputError
from anymamba.runtime.chat.tools import BEGIN, END, Tool
from anymamba.runtime.generation.grammar import MOST_CHARACTERS, MOST_GRAMMAR, Constraint, Grammars

_ANY_TEXT = r"/(.|\n)*/"
# As `json.dumps` writes, so that a call is read again as it was written.
_SPACES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class ToolUse:
    """The tools of a conversation, and how its next answer may use them.

    Args:
        tools: what there is.
        mode: "none" for text alone; "auto" for text, calls or both; "required" for calls alone.
        only: the name of the one tool that must be called, if there is one.
        parallel: whether an answer may have more than one call.

    Example:
        >>> tools = Tool("clock", {"type": "object"}), Tool("weather", {"type": "object"})
        >>> [tool.name for tool in ToolUse(tools, "required", "clock").callable]
        ['clock']
    """

    tools: tuple[Tool, ...]
    mode: Literal["none", "auto", "required"] = "auto"
    only: str | None = None
    parallel: bool = True

    @property
    def callable(self) -> list[Tool]:
        """Those that the next answer may call."""
        if self.mode == "none":
            return []
        return [tool for tool in self.tools if self.only in (None, tool.name)]


def constraint_of(
    use: ToolUse, grammars: Grammars, schema: Mapping[str, Any] | bool | None = None
) -> Constraint:
    """What the next answer may be.

    Args:
        use: the tools.
        grammars: of the model.
        schema: what the text must be, where it is no call; None for any text.

    Raises:
        InputError: a schema cannot be enforced; the message names its tool.
    """
    try:
        grammar = _grammar(use, grammars, schema)
    except RecursionError:
        raise InputError("a schema of the tools is nested too deeply") from None
    are_too_many = len(grammar) > MOST_GRAMMAR  # which is refused below
    for tool in use.callable:
        if are_too_many and len(_json(tool.parameters)) <= MOST_CHARACTERS:
            continue
        try:
            grammars.json(tool.parameters)
        except InputError as error:
            raise InputError(f"tool {tool.name!r}: {error}") from None
    return grammars.lark(grammar)


def _grammar(use: ToolUse, grammars: Grammars, schema: Mapping[str, Any] | bool | None) -> str:
    begin, end = (grammars.special_token(mark) or json.dumps(mark) for mark in (BEGIN, END))
    rules = [f"TEXT: {_ANY_TEXT} & ~/(.|\\n)*{BEGIN}(.|\\n)*/"]
    text = "TEXT" if schema is None else _json(schema)
    if not use.callable:
        return _lark(text, rules)
    if use.mode == "required" or schema is not None:
        head = begin
    elif begin.startswith("<"):
        head = f"TEXT {begin}"
    else:  # as soon as the mark is there, a call has begun
        rules.append(f"head[lazy]: /(.|\\n)*{BEGIN}/")
        head = "head"
    more = f' ("\\n" {begin} call {end})*' if use.parallel else ""
    calls = f"{head} call {end}{more}"
    names = [f"tool_{i}" for i in range(len(use.callable))]
    rules.append('call: "\\n{\\"name\\": \\"" (' + " | ".join(names) + ') "}\\n"')
    for name, tool in zip(names, use.callable, strict=True):
        begins = json.dumps(f'{tool.name}", "arguments": ')
        rules.append(f"{name}: {begins} {_json(tool.parameters)}")
    return _lark(calls if use.mode == "required" else f"{text} | {calls}", rules)


def _lark(start: str, rules: Sequence[str]) -> str:
    return "\n".join(["%llguidance {}", f"start: {start}", *rules])


def _json(schema: Mapping[str, Any] | bool) -> str:
    given = {"allOf": [schema]} if isinstance(schema, bool) else schema
    return "%json " + json.dumps({**given, "x-guidance": _SPACES})
