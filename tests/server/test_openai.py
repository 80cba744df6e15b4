"""OpenAI's own client talks to the server, and finds what it expects."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from anymamba import Engine
from tests.server.conftest import TEMPLATE, serving

openai = pytest.importorskip("openai")

GREEDY = {"temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def client(address: str) -> Any:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["m", "m:adapter", "plain"]
    assert client.models.retrieve("m:adapter").id == "m:adapter"
    with pytest.raises(openai.NotFoundError, match="model 'x' is not served here"):
        client.models.retrieve("x")


def test_a_completion_is_the_engine_s(client: Any, engine: Engine) -> None:
    found = client.completions.create(model="m", prompt="ROMEO:", **GREEDY)
    expected = engine.generate("ROMEO:", max_new_tokens=8)
    assert found.choices[0].text == expected.text
    assert found.choices[0].finish_reason == "length"
    assert found.usage.prompt_tokens == 6
    assert found.usage.completion_tokens == 8


def test_a_stream_is_the_completion(client: Any) -> None:
    whole = client.completions.create(model="m", prompt="JULIET:", n=2, seed=3, max_tokens=8)
    stream = client.completions.create(
        model="m", prompt="JULIET:", n=2, seed=3, max_tokens=8, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    texts, ends, usage = ["", ""], [None, None], None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert ends == ["length", "length"]
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (7, 16)


def test_several_prompts_and_their_tokens(client: Any, engine: Engine) -> None:
    ids = [engine.tokenize(text) for text in ("To be", "or not")]
    for prompts in (["To be", "or not"], ids):
        found = client.completions.create(model="m", prompt=prompts, **GREEDY)
        expected = [engine.generate(prompt, max_new_tokens=8).text for prompt in prompts]
        assert [choice.text for choice in found.choices] == expected


def test_sampling_is_the_engine_s(client: Any, engine: Engine) -> None:
    options = {"temperature": 0.7, "top_p": 0.8, "presence_penalty": 0.5, "frequency_penalty": 0.2}
    found = client.completions.create(
        model="m", prompt="ROMEO:", max_tokens=12, seed=5, stop=["\n\n"], logit_bias={"101": -5},
        extra_body={"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1}, **options,
    )  # fmt: skip
    expected = engine.generate(
        "ROMEO:", max_new_tokens=12, seed=5, stop=["\n\n"], logit_bias={101: -5.0},
        top_k=20, min_p=0.01, repetition_penalty=1.1, **options,
    )  # fmt: skip
    assert found.choices[0].text == expected.text


def test_echo(client: Any, engine: Engine) -> None:
    found = client.completions.create(model="m", prompt="ROMEO:", echo=True, **GREEDY)
    assert found.choices[0].text == "ROMEO:" + engine.generate("ROMEO:", max_new_tokens=8).text


def test_echo_with_log_probabilities(client: Any, engine: Engine) -> None:
    """As the engine scores the prompt, also where it was read before, and where nothing follows."""
    prompt = "Once upon a time there was a kïng. " * 15
    score, ids = engine.score(prompt), engine.tokenize(prompt)
    written = engine.generate(prompt, max_new_tokens=3, top_logprobs=2)
    for most, n in ((3, 2), (3, 1), (0, 1)):
        options = {"echo": True, "logprobs": 2, "temperature": 0, "max_tokens": most, "n": n}
        found = client.completions.create(model="m", prompt=prompt, **options)
        for choice in found.choices:
            expected = [None, *score.logprobs, *written.logprobs[:most]]
            logprobs = choice.logprobs
            assert choice.text == prompt + written.text * (most > 0)
            assert logprobs.token_logprobs[0] is logprobs.top_logprobs[0] is None
            np.testing.assert_allclose(logprobs.token_logprobs[1:], expected[1:], atol=1e-4)
            assert all(len(top) == 2 for top in logprobs.top_logprobs[1:])
            assert logprobs.text_offset == sorted(logprobs.text_offset)
            assert len(logprobs.tokens) == len(ids) + most
        assert found.usage.prompt_tokens_details.cached_tokens == 0
        texts = [""] * n
        for chunk in client.completions.create(model="m", prompt=prompt, stream=True, **options):
            for part in chunk.choices:
                texts[part.index] += part.text
        assert texts == [choice.text for choice in found.choices]


def test_log_probabilities(client: Any, engine: Engine) -> None:
    found = client.completions.create(model="m", prompt="ROMEO:", logprobs=2, **GREEDY)
    expected = engine.generate("ROMEO:", max_new_tokens=8, top_logprobs=2)
    logprobs = found.choices[0].logprobs
    assert "".join(logprobs.tokens) == found.choices[0].text
    np.testing.assert_allclose(logprobs.token_logprobs, expected.logprobs, atol=1e-4)
    assert all(len(top) == 2 for top in logprobs.top_logprobs)
    chat = client.chat.completions.create(
        model="m", messages=[{"role": "user", "content": "Hi"}], logprobs=True, top_logprobs=3,
        temperature=0, max_completion_tokens=4,
    )  # fmt: skip
    content = chat.choices[0].logprobs.content
    assert "".join(token.token for token in content) == chat.choices[0].message.content
    assert [len(token.top_logprobs) for token in content] == [3] * 4


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
WRITTEN = "system: Be brief.\nuser: Who?\nassistant:"


def test_a_chat_is_written_by_the_template(client: Any, engine: Engine) -> None:
    assert TEMPLATE.endswith("assistant:")
    found = client.chat.completions.create(
        model="m", messages=MESSAGES, temperature=0, max_completion_tokens=8
    )
    assert found.choices[0].message.content == engine.generate(WRITTEN, max_new_tokens=8).text
    assert found.choices[0].message.role == "assistant"
    parts = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "o?"}]
    again = client.chat.completions.create(
        model="m", messages=[MESSAGES[0], {"role": "user", "content": parts}], temperature=0,
        max_tokens=8,
    )  # fmt: skip
    assert again.choices[0].message.content == found.choices[0].message.content


def test_a_chat_streams(client: Any, engine: Engine) -> None:
    stream = client.chat.completions.create(
        model="m", messages=MESSAGES, temperature=0, max_completion_tokens=8, stream=True
    )
    chunks = [chunk.choices[0] for chunk in stream]
    assert chunks[0].delta.role == "assistant"
    text = "".join(chunk.delta.content for chunk in chunks)
    assert text == engine.generate(WRITTEN, max_new_tokens=8).text
    assert chunks[-1].finish_reason == "length"


def test_a_second_turn_costs_what_is_new(client: Any) -> None:
    said = [{"role": "user", "content": "Once upon a time there was a king. " * 20}]
    first = client.chat.completions.create(model="m", messages=said, temperature=0, max_tokens=9)
    said += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "And then?"},
    ]
    second = client.chat.completions.create(model="m", messages=said, temperature=0, max_tokens=9)
    known = first.usage.prompt_tokens
    assert second.usage.prompt_tokens_details.cached_tokens >= known


def test_a_second_turn_reads_the_answer_s_last_token_and_what_is_new(engine: Engine) -> None:
    """Where a template writes an answer as the model did, nothing but its last token is unread."""
    said = [{"role": "user", "content": "Once upon a time there was a king."}]
    with serving(engine, TEMPLATE + " ") as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        first = client.chat.completions.create(model="m", messages=said, max_tokens=9)
        said += [
            {"role": "assistant", "content": first.choices[0].message.content},
            {"role": "user", "content": "And then?"},
        ]
        second = client.chat.completions.create(model="m", messages=said, max_tokens=1)
    read = first.usage.total_tokens - 1
    assert second.usage.prompt_tokens_details.cached_tokens == read


def test_instructions_are_read_once(client: Any, engine: Engine) -> None:
    """Conversations that begin with the same system message go on from its end."""
    cached = []
    for question in ("Who?", "When?", "Where?"):
        said = [
            {"role": "system", "content": "Be as short as a king."},
            {"role": "user", "content": question},
        ]
        found = client.chat.completions.create(model="m", messages=said, max_tokens=1)
        cached.append(found.usage.prompt_tokens_details.cached_tokens)
    known = len(engine.tokenize("system: Be as short as a king."))
    assert cached == [0, known, known]


def test_answers_have_the_form_that_is_asked_for(client: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    form = {
        "type": "json_schema",
        "json_schema": {"name": "person", "schema": schema, "strict": True},
    }
    found = client.chat.completions.create(
        model="m", messages=MESSAGES, response_format=form, max_tokens=300, n=3, seed=1
    )
    for choice in found.choices:
        if choice.finish_reason == "stop":
            person = json.loads(choice.message.content)
            assert set(person) == {"name", "age"}
            assert type(person["age"]) is int
    assert any(choice.finish_reason == "stop" for choice in found.choices)
    found = client.completions.create(
        model="m", prompt="ROMEO:", max_tokens=400, temperature=0,
        extra_body={"response_format": form | {"json_schema": {"schema": {"enum": [7]}}}},
    )  # fmt: skip
    assert (found.choices[0].text, found.choices[0].finish_reason) == ("7", "stop")


def test_a_model_without_a_template_says_so(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="has no chat template"):
        client.chat.completions.create(model="plain", messages=MESSAGES)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 3}, "temperature is 3, expected a number from 0 to 2"),
        ({"n": 0}, "n is 0, expected a whole number from 1"),
        ({"max_tokens": "many"}, "max_tokens is 'many', expected a whole number"),
        ({"stop": [""]}, "stop is \\[''\\], expected"),
        ({"logit_bias": {"a": 1}}, "logit_bias is"),
        ({"logit_bias": {"100000": 1}}, "token 100000"),
        ({"suffix": "."}, "suffix is '.', which is not supported"),
        ({"best_of": 3}, "best_of is 3, which is not supported"),
        ({"extra_body": {"wings": 2}}, "'wings' is not a field that is supported"),
        ({"prompt": [[1, "a"]]}, "prompt is"),
        ({"prompt": [10**9]}, "token 1000000000"),
        ({"prompt": []}, "prompt is"),
    ],
)
def test_wrong_fields_are_named(client: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        client.completions.create(**{"model": "m", "prompt": "ROMEO:", **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "messages is"),
        ({"messages": [{"role": "king", "content": "a"}]}, r"messages\[0\].role is 'king'"),
        ({"messages": [{"role": "user", "content": 1}]}, r"messages\[0\].content is"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"functions": [{"name": "f"}]}, "'functions' is not a field"),
        ({"response_format": {"type": "xml"}}, "response_format.type is 'xml'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema is missing"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"type": "wing"}},
                }
            },
            "the JSON schema cannot be enforced: Invalid type: wing",
        ),
    ],
)
def test_wrong_chat_fields_are_named(client: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(**{"model": "m", "messages": MESSAGES, **fields})


def test_keys(engine: Engine) -> None:
    with serving(engine, api_key="sesame") as address:
        for key, fits in (("sesame", True), ("sesam", False), ("", False)):
            client = openai.OpenAI(base_url=f"{address}/v1", api_key=key or "-", max_retries=0)
            if fits:
                assert client.models.list().data
            else:
                with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
                    client.models.list()
