"""OpenAI's own client talks to /v1/responses, and finds what it expects."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from anymamba import Engine
from anymamba.runtime.chat import tool_grammar
from anymamba.runtime.chat.tools import call_as_text
from anymamba.runtime.generation.grammar import Constraint
from anymamba.server.errors import ApiError
from anymamba.server.stored_responses import StoredResponses
from tests.server.conftest import CITY, fails_later, serving

openai = pytest.importorskip("openai")

WRITTEN = "system: Be brief.\nuser: Who?\nassistant:"
TOOLS = [
    {"type": "function", "name": "weather", "parameters": CITY, "strict": True},
    {"type": "function", "name": "clock"},
]


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as made:
        yield made


def ask(client: Any, **fields: Any) -> Any:
    wanted = {"model": "m", "input": "Who?", "temperature": 0, "max_output_tokens": 8}
    return client.responses.create(**{**wanted, **fields})


def test_a_response_is_the_engine_s(client: Any, engine: Engine) -> None:
    expected = engine.generate(WRITTEN, max_new_tokens=8).text
    developer = {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]}
    user = {"type": "message", "role": "user", "content": "Who?"}
    for fields in ({"instructions": "Be brief."}, {"input": [developer, user]}):
        found = ask(client, **fields)
        assert found.output_text == expected
        assert (found.status, found.incomplete_details.reason) == (
            "incomplete",
            "max_output_tokens",
        )
        assert found.usage.input_tokens == len(engine.tokenize(WRITTEN))
        assert found.usage.output_tokens == 8
    assert found.usage.input_tokens_details.cached_tokens > 0


def test_a_stream_is_the_response(client: Any) -> None:
    whole = ask(client, max_output_tokens=20)
    kinds, text, numbers = [], "", []
    for event in ask(client, max_output_tokens=20, stream=True):
        kinds.append(event.type.removeprefix("response."))
        numbers.append(event.sequence_number)
        if kinds[-1] == "output_text.delta":
            text += event.delta
    assert text == event.response.output_text == whole.output_text
    assert numbers == list(range(len(numbers)))
    assert [kind for kind in kinds if kind != "output_text.delta"] == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("output_text.done", "content_part.done", "output_item.done", "incomplete"),
    ]
    assert event.response.usage.output_tokens == 20


def test_a_conversation_that_the_server_remembers(client: Any, engine: Engine) -> None:
    first = ask(client, instructions="Be brief.")
    second = ask(client, previous_response_id=first.id, input="And?")
    written = f"user: Who?\nassistant: {first.output_text}\nuser: And?\nassistant:"
    assert second.output_text == engine.generate(written, max_new_tokens=8).text
    assert second.previous_response_id == first.id
    third = ask(client, previous_response_id=second.id, input="So?")
    assert third.usage.input_tokens_details.cached_tokens >= second.usage.input_tokens
    found = client.responses.retrieve(first.id)
    assert found.to_dict() == first.to_dict()
    client.responses.delete(first.id)
    for forgotten in (first.id, ask(client, store=False).id):
        with pytest.raises(openai.NotFoundError, match="there is no response"):
            client.responses.retrieve(forgotten)
        with pytest.raises(openai.NotFoundError, match="there is no response") as raised:
            ask(client, previous_response_id=forgotten)
        assert raised.value.param == "previous_response_id"


def test_old_responses_make_room() -> None:
    def body(number: int, size: int = 10) -> dict[str, Any]:
        return {"id": f"resp_{number}", "text": "a" * size}

    stored = StoredResponses(200)
    for number in range(9):
        stored.add(body(number), [])
        stored.get("resp_0")  # used, and so not the oldest
    assert stored.get("resp_0").body == body(0)
    assert stored.get("resp_8").body == body(8)
    with pytest.raises(ApiError, match="had to make room"):
        stored.get("resp_1")
    stored.add(body(10, 1000), [])
    with pytest.raises(ApiError):
        stored.get("resp_10")
    for name in ("resp_0", "resp_8"):
        stored.remove(name)
    stored.add(body(11, 100), [])


def test_tools(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call, its result by the response's id and by items, whole and as a stream."""
    only = {"type": "function", "name": "weather"}
    (call,) = ask(
        client, max_output_tokens=99, tools=TOOLS, tool_choice=only, parallel_tool_calls=False
    ).output
    assert (call.type, call.name, call.status) == ("function_call", "weather", "completed")
    assert json.loads(call.arguments)["city"] in ("Oslo", "Rome")
    calls = [call_as_text("weather", {"city": "Oslo"}), call_as_text("clock", {})]
    lark = f"%llguidance {{}}\nstart: {json.dumps(chr(10).join(['See:', *calls]))}"
    with monkeypatch.context() as patch:
        patch.setattr(tool_grammar, "_grammar", lambda *_: lark)
        whole = ask(client, max_output_tokens=400, tools=TOOLS)
        with client.responses.stream(
            model="m", input="Who?", max_output_tokens=400, tools=TOOLS
        ) as stream:
            streamed = stream.get_final_response()
    for found in (whole, streamed):
        assert (found.status, found.output_text) == ("completed", "See:")
        _, weather, clock = found.output
        assert (weather.name, json.loads(weather.arguments)) == ("weather", {"city": "Oslo"})
        assert (clock.name, clock.arguments) == ("clock", "{}")
    results = [
        {"type": "function_call_output", "call_id": call.call_id, "output": "3"}
        for call in (weather, clock)
    ]
    by_id = ask(client, previous_response_id=streamed.id, input=results, tools=TOOLS)
    items = [{"role": "user", "content": "Who?"}, *whole.to_dict()["output"]]
    outputs = [
        {"type": "function_call_output", "call_id": call.call_id, "output": "3"}
        for call in whole.output[1:]
    ]
    by_items = ask(client, input=[*items, *outputs], tools=TOOLS)
    assert by_items.usage.input_tokens == by_id.usage.input_tokens
    assert by_id.usage.input_tokens_details.cached_tokens >= streamed.usage.input_tokens


def test_a_call_that_is_cut_short(client: Any) -> None:
    for streams in (False, True):
        found = ask(
            client, max_output_tokens=60, tools=TOOLS[:1], tool_choice="required", stream=streams
        )
        if streams:
            found = list(found)[-1].response
        assert found.status == "incomplete"
        assert [item.status for item in found.output] == ["incomplete"]


def test_a_form_of_the_answer_and_its_log_probabilities(client: Any) -> None:
    form = {"type": "json_schema", "name": "a", "schema": {"enum": [77]}, "strict": True}
    found = ask(
        client, text={"format": form}, include=["message.output_text.logprobs"], top_logprobs=2
    )
    assert (found.output_text, found.status) == ("77", "completed")
    logprobs = found.output[0].content[0].logprobs
    assert "".join(token.token for token in logprobs[:2]) == "77"
    assert all(len(token.top_logprobs) == 2 for token in logprobs[:2])
    assert ask(client, text={"format": {"type": "text"}}).output[0].content[0].logprobs == []


IMAGE = {"role": "user", "content": [{"type": "input_image", "image_url": "http://a"}]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input": []}, "input is"),
        ({"input": [IMAGE]}, r"input\[0\].content is"),
        ({"input": [{"type": "reasoning", "summary": []}]}, r"input\[0\].type is 'reasoning'"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "type is 'item_reference'"),
        (
            {"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]},
            "'a' is the id of no tool call before it",
        ),
        ({"max_output_tokens": 0}, "max_output_tokens is 0"),
        ({"background": True}, "background is True, which is not supported"),
        ({"truncation": "auto"}, "truncation is 'auto', which is not supported"),
        ({"reasoning": {"effort": "low"}}, "'reasoning' is not a field"),
        ({"conversation": "conv_a"}, "'conversation' is not a field"),
        ({"tools": [{"type": "web_search"}]}, r"tools\[0\].type is 'web_search'"),
        ({"tools": TOOLS, "tool_choice": {"type": "mcp"}}, "tool_choice.type is 'mcp'"),
        ({"text": {"verbosity": "low"}}, "text.verbosity is 'low'"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type is 'grammar'"),
        ({"include": ["reasoning.encrypted_content"]}, "include is"),
        ({"tools": TOOLS, "top_logprobs": 2}, "beside tools are not supported"),
        ({"metadata": {"a": 1}}, "metadata is"),
    ],
)
def test_wrong_fields_are_named(client: Any, fields: dict[str, Any], message: str) -> None:
    extra = {"model": "m", "input": "a", **fields}
    with pytest.raises(openai.BadRequestError, match=message):
        client.responses.create(extra_body=extra)


def test_a_stream_tells_what_goes_wrong(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Constraint, "__call__", fails_later)
    form = {"type": "json_schema", "name": "a", "schema": {}}
    with serving(engine) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        *events, last = ask(client, stream=True, text={"format": form})
    assert "response.output_text.delta" in [event.type for event in events]
    assert (last.type, last.message) == ("error", "the grammar fails")
    assert last.sequence_number == len(events)
