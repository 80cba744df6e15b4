"""Tools: what a model is told of them, and calls that fit their schemas whatever it wants."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer

from anymamba import Engine, Sampling
from anymamba.runtime.chat import tool_grammar
from anymamba.runtime.chat.model_template import ChatTemplate
from anymamba.runtime.chat.tool_grammar import ToolUse
from anymamba.runtime.chat.tools import BEGIN, END, Tool, call_as_text
from anymamba.runtime.generation import TokenOutput
from anymamba.server.chats.deltas import collect
from anymamba.server.chats.turn import Turn
from tests.server.conftest import TEMPLATE, serving

openai = pytest.importorskip("openai")

PLACE = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Oslo", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Of tomorrow.", "parameters": PLACE},
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
ASKED = [{"role": "user", "content": "Is it warm?"}]
KNOWING = """\
{%- if tools %}<tools>
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}</tools>
{% endif %}
{%- for m in messages %}{{ m.role }}: {{ m.content }}
{%- for call in m.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}
{% endfor %}assistant:"""


@pytest.fixture(scope="module", params=[TEMPLATE, KNOWING], ids=["plain", "knowing"])
def client(request: Any, engine: Engine) -> Iterator[Any]:
    with serving(engine, template=request.param) as address:
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def ask(client: Any, **fields: Any) -> Any:
    wanted = {"model": "m", "messages": ASKED, "tools": [WEATHER, CLOCK], "max_tokens": 300}
    return client.chat.completions.create(**{**wanted, **fields})


def check_calls(calls: list[tuple[str, str]]) -> None:
    for name, arguments in calls:
        found = json.loads(arguments)
        if name == "clock":
            assert found == {}
        else:
            assert name == "weather"
            assert set(found) == {"city", "days"}
            assert found["city"] in ("Oslo", "Rome")
            assert found["days"] in range(1, 10)


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"weather", "clock"}),
        ({"type": "function", "function": {"name": "clock"}}, {"clock"}),
        ({"type": "function", "function": {"name": "weather"}}, {"weather"}),
    ],
)
def test_calls_fit_their_schemas(client: Any, choice: Any, names: set[str]) -> None:
    found = ask(client, tool_choice=choice, n=3, seed=1, parallel_tool_calls=False)
    for choice in found.choices:
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        (call,) = choice.message.tool_calls
        assert call.id.startswith("call_")
        assert call.function.name in names
        check_calls([(call.function.name, call.function.arguments)])


def streamed(chunks: Any) -> tuple[str, dict[int, dict[str, str]], str]:
    """The text, the calls by their index, and the reason at the end."""
    text, calls, reason = "", {}, ""
    for chunk in chunks:
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        for part in choice.delta.tool_calls or []:
            if part.id:
                assert part.index == len(calls)
                calls[part.index] = {"id": part.id, "name": part.function.name, "arguments": ""}
            calls[part.index]["arguments"] += part.function.arguments
        reason = choice.finish_reason or reason
    return text, calls, reason


def forced(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Let the model, which knows nothing of tools, write this."""
    lark = f"%llguidance {{}}\nstart: {json.dumps(text)}"
    monkeypatch.setattr(tool_grammar, "_grammar", lambda *_: lark)


CALLS = [("weather", {"city": "Oslo", "days": 3}), ("clock", {})]


def test_text_and_several_calls(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    written = "\n".join(["Let me see <you>.", *(call_as_text(*call) for call in CALLS)])
    forced(monkeypatch, written)
    choice = ask(client).choices[0]
    assert choice.message.content == "Let me see <you>."
    assert choice.finish_reason == "tool_calls"
    calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls]
    assert [(name, json.loads(arguments)) for name, arguments in calls] == CALLS
    text, parts, reason = streamed(ask(client, stream=True))
    assert (text, reason) == ("Let me see <you>.", "tool_calls")
    assert [(part["name"], part["arguments"]) for part in parts.values()] == calls


def test_what_looks_like_a_call_and_is_none(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forced(monkeypatch, "Write\n<tool_")
    choice = ask(client).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Write\n<tool_", "stop")
    assert streamed(ask(client, stream=True)) == ("Write\n<tool_", {}, "stop")


def test_marks_that_are_special_tokens_have_no_text(engine: Engine) -> None:
    tokenizer = Tokenizer.from_str(engine.tokenizer.to_str())
    tokenizer.add_special_tokens([BEGIN, END])
    known = SimpleNamespace(tokenizer=tokenizer, detokenize=tokenizer.decode)
    use = ToolUse((Tool("f", {"type": "object"}),))
    turn = Turn("m", known, ASKED, Sampling(), use)  # type: ignore[arg-type]
    inner = call_as_text("f", {"a": 1}).removeprefix(BEGIN).removesuffix(END)
    marks = [tokenizer.token_to_id(mark) for mark in (BEGIN, END)]
    pieces = [TokenOutput("Well", (1,)), TokenOutput("", (marks[0],)), TokenOutput(inner, (1,))]
    pieces += [TokenOutput("", (marks[1],)), TokenOutput("", (0,), finish_reason="eos")]
    answers = SimpleNamespace(tokens=lambda: given(pieces))
    (said,) = asyncio.run(collect(turn, answers))  # type: ignore[arg-type]
    assert (said.text, said.ending) == ("Well", "calls")
    assert [(call.name, call.parsed) for call in said.calls] == [("f", {"a": 1})]


async def given(pieces: list[TokenOutput]) -> AsyncIterator[tuple[int, TokenOutput]]:
    for piece in pieces:
        yield 0, piece


def test_a_second_turn_with_a_result(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client sends back what it was given, and the server reads only what is new."""
    forced(monkeypatch, call_as_text(*CALLS[0]))
    first = ask(client, messages=[{"role": "system", "content": "Be warm."}, *ASKED])
    message = first.choices[0].message
    said = [
        {"role": "system", "content": "Be warm."},
        *ASKED,
        message,
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "3 degrees"},
    ]
    monkeypatch.undo()
    second = ask(client, messages=said, tool_choice="none", max_tokens=5)
    assert second.choices[0].message.tool_calls is None
    read = first.usage.prompt_tokens
    assert second.usage.prompt_tokens_details.cached_tokens >= read
    assert second.usage.prompt_tokens > read + len(call_as_text(*CALLS[0]))


def test_a_call_that_is_cut_short(client: Any) -> None:
    found = ask(client, tool_choice="required", max_tokens=60, tools=[WEATHER]).choices[0]
    assert found.finish_reason == "length"
    (call,) = found.message.tool_calls
    assert call.function.arguments.startswith('{"city"')


def test_a_form_of_the_text_beside_tools(client: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["warm"]}}}
    found = ask(client, response_format=form, tool_choice="none").choices[0]
    assert (found.message.content, found.finish_reason) == ('"warm"', "stop")
    found = ask(client, response_format=form, parallel_tool_calls=False).choices[0]
    if found.message.tool_calls:
        check_calls([(c.function.name, c.function.arguments) for c in found.message.tool_calls])
    else:
        assert found.message.content == '"warm"'


def test_templates_are_told_in_their_own_way(engine: Engine) -> None:
    tools = [Tool("clock", {"type": "object"})]
    knowing, plain = ChatTemplate(KNOWING, {}), ChatTemplate(TEMPLATE, {})
    assert (knowing.knows_tools, plain.knows_tools) == (True, False)
    assert knowing.render(ASKED, tools).startswith('<tools>\n{"type": "function"')
    told = plain.render([{"role": "system", "content": "Be warm."}, *ASKED], tools)
    assert told.startswith("system: Be warm.\n\nYou may call functions")
    assert '{"type": "function", "function": {"name": "clock"' in told
    assert told.endswith("user: Is it warm?\nassistant:")


RESULT = {"role": "tool", "tool_call_id": "a", "content": "b"}
BAD_CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "[]"}}


def function(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", **fields}}]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (function(parameters={"type": "string"}), "arguments of tool 'f'"),
        (
            function(parameters={"type": "object", "properties": {"a": {"type": "wing"}}}),
            "tool 'f': the JSON schema cannot be enforced: Invalid type: wing",
        ),
        (function(name="a b"), r"tools\[0\].function.name is 'a b'"),
        (function(wings=2), r"'tools\[0\].function.wings' is not a field"),
        ({"tools": [{"type": "custom", "custom": {}}]}, r"tools\[0\].type is 'custom'"),
        ({"tools": [CLOCK, CLOCK]}, "two tools have the name 'clock'"),
        ({"tools": [{}] * 129}, "tools is"),
        ({"tool_choice": "always"}, "tool_choice is 'always'"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.type is 'allowed_tools'"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "f"}}},
            "tool_choice names 'f', which is not one of the tools",
        ),
        ({"tools": [], "tool_choice": "required"}, "tool_choice needs tools"),
        ({"parallel_tool_calls": 3}, "parallel_tool_calls is 3"),
        ({"messages": [RESULT]}, "'a' is the id of no tool call before it"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [BAD_CALL]}]},
            r"messages\[0\].tool_calls\[0\].function.arguments is '\[\]'",
        ),
    ],
)
def test_wrong_tools_are_named(client: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        ask(client, **fields)
