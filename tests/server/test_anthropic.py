"""Anthropic's own client talks to the server, and finds what it expects."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from anymamba import Engine
from anymamba.runtime.chat import tool_grammar
from anymamba.runtime.chat.tools import call_as_text
from anymamba.runtime.generation.grammar import Constraint
from tests.server.conftest import CITY, TEMPLATE, fails_later, serving

anthropic = pytest.importorskip("anthropic")

SAID = [{"role": "user", "content": "Who?"}]
WRITTEN = "system: Be brief.\nuser: Who?\nassistant:"
TOOLS = [
    {"name": "weather", "description": "Of tomorrow.", "input_schema": CITY},
    {"type": "custom", "name": "clock", "input_schema": {"type": "object", "properties": {}}},
]


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=address, api_key="none", max_retries=0) as made:
        yield made


def ask(client: Any, **fields: Any) -> Any:
    wanted = {"model": "m", "max_tokens": 8, "system": "Be brief.", "messages": SAID, **fields}
    # Later releases of the client do not name these, and send them all the same.
    unnamed = {
        name: wanted.pop(name) for name in ("temperature", "top_k", "top_p") if name in wanted
    }
    extra = {**unnamed, **wanted.pop("extra_body", {})}
    return client.messages.create(**wanted, extra_body=extra)


def test_a_message_is_the_engine_s(client: Any, engine: Engine) -> None:
    assert TEMPLATE.endswith("assistant:")
    expected = engine.generate(WRITTEN, max_new_tokens=8).text
    blocks = [{"type": "text", "text": "Wh", "cache_control": {"type": "ephemeral"}}]
    blocks += [{"type": "text", "text": "o?"}]
    for fields in (
        {},
        {"system": [{"type": "text", "text": "Be brief."}]},
        {"messages": [{"role": "user", "content": blocks}]},
    ):
        found = ask(client, temperature=0, **fields)
        assert [block.text for block in found.content] == [expected]
        assert (found.role, found.stop_reason, found.stop_sequence) == (
            "assistant",
            "max_tokens",
            None,
        )
        read = found.usage.input_tokens + found.usage.cache_read_input_tokens
        assert (read, found.usage.output_tokens) == (len(engine.tokenize(WRITTEN)), 8)
    assert found.usage.cache_read_input_tokens > 0


def test_a_stream_is_the_message(client: Any) -> None:
    whole = ask(client, temperature=0, max_tokens=20)
    with client.messages.stream(
        model="m", max_tokens=20, system="Be brief.", messages=SAID, extra_body={"temperature": 0}
    ) as stream:
        text = "".join(stream.text_stream)
        found = stream.get_final_message()
    assert text == whole.content[0].text == found.content[0].text
    assert (found.stop_reason, found.usage.output_tokens) == ("max_tokens", 20)
    kinds = [event.type for event in ask(client, temperature=0, stream=True)]
    assert kinds[:1] + kinds[-3:] == [
        "message_start",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


def test_stop_sequences_and_settings(client: Any, engine: Engine) -> None:
    expected = engine.generate(WRITTEN, max_new_tokens=60).text
    stop = expected[10:12]
    found = ask(client, temperature=0, max_tokens=60, stop_sequences=["\0", stop])
    assert (found.stop_reason, found.stop_sequence) == ("stop_sequence", stop)
    assert found.content[0].text == expected[: expected.index(stop)]
    greedy = ask(client, temperature=1, top_k=1, top_p=0.5)
    assert greedy.content[0].text == expected[: len(greedy.content[0].text)]


def test_an_answer_goes_on_from_its_beginning(client: Any, engine: Engine) -> None:
    said = [*SAID, {"role": "assistant", "content": "I am"}]
    found = ask(client, temperature=0, messages=said)
    expected = engine.generate(WRITTEN + "I am", max_new_tokens=8).text
    assert found.content[0].text == expected


def test_several_messages_of_one_are_a_turn(client: Any) -> None:
    twice = ask(client, temperature=0, messages=[*SAID, *SAID])
    once = ask(client, temperature=0, messages=[{"role": "user", "content": "Who?\nWho?"}])
    assert twice.content[0].text == once.content[0].text


def test_the_system_may_speak_later(client: Any, engine: Engine) -> None:
    found = ask(client, temperature=0, messages=[*SAID, {"role": "system", "content": "Now."}])
    written = WRITTEN.replace("assistant:", "system: Now.\nassistant:")
    assert found.content[0].text == engine.generate(written, max_new_tokens=8).text


def test_tokens_are_counted(client: Any, engine: Engine) -> None:
    found = client.messages.count_tokens(model="m", system="Be brief.", messages=SAID)
    assert found.input_tokens == len(engine.tokenize(WRITTEN))
    more = client.messages.count_tokens(model="m", messages=SAID, tools=TOOLS)
    assert more.input_tokens > found.input_tokens + 100


def test_tools(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call, its result, and an answer; whole and as a stream."""
    only = {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}
    found = ask(client, max_tokens=99, tools=TOOLS, tool_choice=only)
    assert found.stop_reason == "tool_use"
    assert all(block.input["city"] in ("Oslo", "Rome") for block in found.content)
    written = (
        "See:\n" + call_as_text("weather", {"city": "Oslo"}) + "\n" + call_as_text("clock", {})
    )
    lark = f"%llguidance {{}}\nstart: {json.dumps(written)}"
    with monkeypatch.context() as patch:
        patch.setattr(tool_grammar, "_grammar", lambda *_: lark)
        whole = ask(client, max_tokens=400, tools=TOOLS)
        with client.messages.stream(
            model="m", max_tokens=400, messages=SAID, tools=TOOLS
        ) as stream:
            streamed = stream.get_final_message()
    for message in (whole, streamed):
        text, weather, clock = message.content
        assert (text.text, message.stop_reason) == ("See:", "tool_use")
        assert (weather.name, weather.input) == ("weather", {"city": "Oslo"})
        assert (clock.name, clock.input) == ("clock", {})
    result = {"type": "tool_result", "tool_use_id": weather.id, "content": "3 degrees"}
    failed = {
        "type": "tool_result",
        "tool_use_id": clock.id,
        "is_error": True,
        "content": [{"type": "text", "text": "broken"}],
    }
    said = [
        *SAID,
        {"role": "assistant", "content": streamed.content},
        {"role": "user", "content": [result, failed, {"type": "text", "text": "And?"}]},
    ]
    answer = ask(client, messages=said, tools=TOOLS, tool_choice={"type": "none"})
    assert answer.stop_reason == "max_tokens"


def test_a_form_of_the_answer(client: Any) -> None:
    form = {"type": "json_schema", "schema": {"enum": [7]}}
    found = ask(client, max_tokens=9, output_config={"format": form})
    assert (found.content[0].text, found.stop_reason) == ("7", "end_turn")


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://a"}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0, expected a whole number from 1"),
        ({"temperature": 1.5}, "temperature is 1.5, expected a number from 0 to 1"),
        ({"messages": []}, "messages is"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, r"content\[0\].type is 'image'"),
        ({"messages": [{"role": "tool", "content": "a"}]}, r"messages\[0\].role is 'tool'"),
        ({"messages": [*SAID, {"role": "assistant", "content": "a "}]}, "without spaces"),
        ({"system": [IMAGE]}, r"system\[0\].type is 'image'"),
        ({"stop_sequences": [""]}, "stop_sequences is"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "thinking.type is 'enabled'"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "type is 'bash_20250124'"),
        ({"tools": [{"name": "a", "input_schema": {"type": "array"}}]}, "arguments of tool 'a'"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "b"}}, "tool_choice names 'b'"),
        ({"output_config": {"effort": "low"}}, "'output_config.effort' is not a field"),
        ({"extra_body": {"mcp_servers": []}}, "'mcp_servers' is not a field"),
        ({"extra_headers": {"anthropic-version": "1999"}}, "anthropic-version is '1999'"),
    ],
)
def test_wrong_fields_are_named(client: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(anthropic.BadRequestError, match=message) as raised:
        ask(client, **fields)
    assert raised.value.body["type"] == "error"
    assert raised.value.body["error"]["type"] == "invalid_request_error"


def test_errors_have_anthropic_s_form(engine: Engine) -> None:
    with serving(engine, api_key="sesame", body_bytes=1000) as address:
        for key, fits in (("sesame", True), ("sesam", False)):
            client = anthropic.Anthropic(base_url=address, api_key=key, max_retries=0)
            if fits:
                assert ask(client).role == "assistant"
                with pytest.raises(anthropic.NotFoundError, match="'x' is not served here"):
                    ask(client, model="x")
                with pytest.raises(anthropic.RequestTooLargeError, match="larger than 1000"):
                    ask(client, system="a" * 1000)
                bearer = anthropic.Anthropic(base_url=address, auth_token=key, api_key=None)
                assert ask(bearer).role == "assistant"
            else:
                with pytest.raises(anthropic.AuthenticationError, match="missing or wrong"):
                    ask(client)
        answer = httpx.get(f"{address}/v1/messages", headers={"x-api-key": "sesame"})
        assert (answer.status_code, answer.json()["type"]) == (405, "error")


def test_signs_of_life_and_errors_are_events(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anymamba.server.sse.PING_SECONDS", 0.001)
    body = {"max_tokens": 300, "messages": SAID, "stream": True}
    with serving(engine) as address:
        lines = httpx.post(f"{address}/v1/messages", json=body).text.split("\n")
        assert lines.count("event: ping") > 1
        assert lines.count('data: {"type":"ping"}') == lines.count("event: ping")
        monkeypatch.setattr(Constraint, "__call__", fails_later)
        body["output_config"] = {"format": {"type": "json_schema", "schema": {}}}
        lines = httpx.post(f"{address}/v1/messages", json=body).text.split("\n")
    assert "event: content_block_delta" in lines
    name, data = [line for line in lines if line][-2:]
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: ")) == {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": "the grammar fails"},
    }
