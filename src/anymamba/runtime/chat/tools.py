"""Tools that a model may call: how they are told to it, and how calls are written down.

A call is a line of JSON between two marks, the form of Nous Research's Hermes models, which Qwen,
Granite, Falcon-H1 and many others took over:

    <tool_call>
    {"name": "weather", "arguments": {"city": "Oslo"}}
    </tool_call>

A template that knows tools and this form writes all of it. For any other, tools are told in a
system message, calls are a part of what the assistant says, and results of what the user does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BEGIN, END = "<tool_call>", "</tool_call>"

_INTRODUCTION = """\
You may call functions to answer. These are the functions, each a line of JSON between <tools> and \
</tools>:
<tools>
{tools}
</tools>
To call one, write a line of JSON with its name and arguments between <tool_call> and </tool_call>:
<tool_call>
{{"name": NAME, "arguments": ARGUMENTS}}
</tool_call>"""


@dataclass(frozen=True)
class Tool:
    """A function that the model may call.

    Args:
        name: of letters, digits, "_" and "-".
        parameters: a JSON schema of an object, its arguments.
        description: what it is for.
    """

    name: str
    parameters: Mapping[str, Any]
    description: str | None = None

    @property
    def described(self) -> dict[str, Any]:
        """As OpenAI describes it, which templates expect."""
        about = {} if self.description is None else {"description": self.description}
        function = {"name": self.name, **about, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


def is_in(template: str) -> bool:
    """Whether a template knows tools, and writes calls in the form that is enforced here.

    Example:
        >>> is_in("{% for tool in tools %}{{ tool }}{% endfor %} ... <tool_call>")
        True
        >>> is_in("{% for m in messages %}{{ m.content }}{% endfor %}")
        False
    """
    return "tools" in template and BEGIN in template and "<function=" not in template


def call_as_text(name: str, arguments: object) -> str:
    """A call as the model writes it.

    Example:
        >>> print(call_as_text("weather", {"city": "Oslo"}))
        <tool_call>
        {"name": "weather", "arguments": {"city": "Oslo"}}
        </tool_call>
    """
    return f"{BEGIN}\n{_line({'name': name, 'arguments': arguments})}\n{END}"


def as_text(messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """A conversation without tools, calls and results, but for what is said of them in words.

    Example:
        >>> as_text([{"role": "tool", "content": "3 degrees", "tool_call_id": "a"}], [])
        [{'role': 'user', 'content': '<tool_response>\\n3 degrees\\n</tool_response>'}]
    """
    said: list[dict[str, Any]] = []
    for before, message in zip([None, *messages], messages, strict=False):
        role, content = message["role"], message["content"]
        if role == "tool":
            content = f"<tool_response>\n{content}\n</tool_response>"
            if before is not None and before["role"] == "tool":  # many templates want turns
                said[-1]["content"] += "\n" + content
                continue
            role = "user"
        calls = [call["function"] for call in message.get("tool_calls", ())]
        texts = [call_as_text(call["name"], call["arguments"]) for call in calls]
        said.append({"role": role, "content": "\n".join([content] * bool(content) + texts)})
    if not tools:
        return said
    told = _INTRODUCTION.format(tools="\n".join(_line(tool.described) for tool in tools))
    if said and said[0]["role"] == "system":
        said[0]["content"] += "\n\n" + told
    else:
        said.insert(0, {"role": "system", "content": told})
    return said


def _line(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
