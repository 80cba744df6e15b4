"""Calls of tools: the grammar lets through what fits, and the parser reads it however it is cut."""

import json
import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

import anymamba
from anymamba.errors import InputError
from anymamba.runtime.chat.model_template import ChatTemplate, find_template
from anymamba.runtime.chat.tool_calls import CallPart, ToolCallParser
from anymamba.runtime.chat.tool_grammar import ToolUse, constraint_of
from anymamba.runtime.chat.tools import BEGIN, END, Tool, as_text, call_as_text

pytest.importorskip("llguidance")

from anymamba.runtime.generation.grammar import Grammars

TOOLS = (
    Tool("add", {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}),
    Tool("say", {"type": "object", "properties": {"text": {"type": "string"}}}),
)
ADD, SAY = call_as_text("add", {"a": 3}), call_as_text("say", {"text": 'é"}\n</tool_call>'})
TEMPLATE = """\
{%- if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.content }}
{%- for call in m.tool_calls or [] %}<tool_call>{{ call | tojson }}{% endfor %}{% endfor %}"""


@pytest.fixture(scope="module")
def grammars():
    engine = anymamba.load()
    return Grammars(engine.tokenizer, 256, engine.end_ids)


def is_let_through(constraint, grammars, ids):
    """Whether these tokens and then an end are allowed, one after the other."""
    constraint, ids = constraint.fresh(), [*ids, grammars.end_ids[0]]
    return all(constraint(ids[:count])[id] for count, id in enumerate(ids))


@pytest.mark.parametrize(
    ("use", "good", "bad"),
    [
        (
            ToolUse(TOOLS),
            ["", "Hi <b>", ADD, f"Hi\n{ADD}\n{SAY}", f"Hi{SAY}"],
            ["<tool_call>", "a<tool_call>b", f"{ADD} so", ADD.replace("3", "x"), f"{ADD}\nHi"],
        ),
        (ToolUse(TOOLS, parallel=False), ["Hi", f"Hi\n{SAY}"], [f"{ADD}\n{SAY}"]),
        (ToolUse(TOOLS, "none"), ["", "Hi", "<tool_cal"], [ADD, "a<tool_call>"]),
        (ToolUse(TOOLS, "required"), [ADD, f"{SAY}\n{ADD}"], ["", "Hi", f"Hi\n{ADD}"]),
        (ToolUse(TOOLS, "required", "say"), [SAY], [ADD, ""]),
    ],
)
def test_what_may_be_written(grammars, use, good, bad):
    constraint = constraint_of(use, grammars)
    for text in good:
        assert is_let_through(constraint, grammars, text.encode()), text
    for text in bad:
        assert not is_let_through(constraint, grammars, text.encode()), text


def test_marks_that_are_special_tokens():
    engine = anymamba.load()
    tokenizer = Tokenizer.from_str(engine.tokenizer.to_str())
    tokenizer.add_special_tokens([BEGIN, END])
    begin, end = (tokenizer.token_to_id(mark) for mark in (BEGIN, END))
    grammars = Grammars(tokenizer, 258, engine.end_ids)
    constraint = constraint_of(ToolUse(TOOLS), grammars)
    inner = ADD.removeprefix(BEGIN).removesuffix(END).encode()
    assert is_let_through(constraint, grammars, [*b"Hi\n", begin, *inner, end])
    assert is_let_through(constraint, grammars, [begin, *inner, end, 10, begin, *inner, end])
    assert is_let_through(constraint, grammars, b"Hi")
    assert not is_let_through(constraint, grammars, [*b"Hi", begin, end])
    assert not is_let_through(constraint, grammars, ADD.encode())  # spelt out


@settings(max_examples=50)
@given(
    text=st.sampled_from(["", "Hi", "a < b\n", "<tool_", "<tool_call"]),
    calls=st.lists(
        st.tuples(
            st.sampled_from(["add", "say"]),
            st.dictionaries(st.text(max_size=3), st.text(max_size=9), max_size=2),
        ),
        max_size=3,
    ),
    cuts=st.lists(st.integers(0, 200), max_size=20),
)
def test_it_is_read_however_it_is_cut(text, calls, cuts):
    written = "\n".join([text] * bool(text) + [call_as_text(*call) for call in calls])
    borders = sorted({0, len(written), *(cut for cut in cuts if cut < len(written))})
    parser, shown, found, whole = ToolCallParser(), "", [], 0
    for begin, end in pairwise(borders):
        for part in parser.add(written[begin:end]):
            if isinstance(part, CallPart):
                if part.name is not None:
                    found.append([part.name, ""])
                assert part.index == len(found) - 1
                found[-1][1] += part.arguments
                whole += part.is_last
            else:
                shown += part
    shown += parser.finish()
    assert shown == text
    assert whole == len(calls)
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


def test_a_template_gets_tools_and_calls_as_transformers_gives_them():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 3}}}
    said = [
        {"role": "user", "content": "3?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    described = [tool.described for tool in TOOLS]
    [expected], _ = render_jinja_template([said], tools=described, chat_template=TEMPLATE)
    assert ChatTemplate(TEMPLATE, {}).render(said, TOOLS) == expected


PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"


@pytest.mark.parametrize("in_files", [False, True])
def test_a_template_of_its_own_for_tools(tmp_path, in_files):
    """As Transformers' tokenizers choose among several, and with only the other one's words."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=anymamba.load().tokenizer)
    tokenizer.chat_template = {"default": PLAIN, "tool_use": TEMPLATE}
    tokenizer.save_pretrained(tmp_path, save_jinja_files=in_files)
    template = find_template(tmp_path)
    said, described = [{"role": "user", "content": "3?"}], [tool.described for tool in TOOLS]
    expected = tokenizer.apply_chat_template(said, tools=described, tokenize=False)
    assert template.render(said, TOOLS) == expected
    assert template.render(said) == tokenizer.apply_chat_template(said, tokenize=False)
    call = {"id": "a", "function": {"name": "add", "arguments": {"a": 3}}}
    said.append({"role": "assistant", "content": "", "tool_calls": [call]})
    assert template.render(said) == f"user: 3? assistant: {ADD} "
    other = ChatTemplate(PLAIN, {}, "{{ tools }}")  # which writes calls nobody knows how
    assert other.render(said[:1], TOOLS).startswith("system: You may call functions")
    for one in (template, other):
        one.close()


def test_calls_and_results_in_words():
    calls = [{"id": "a", "function": {"name": "add", "arguments": {"a": 3}}}]
    said = [
        {"role": "user", "content": "3?"},
        {"role": "assistant", "content": "Well.", "tool_calls": calls},
        {"role": "tool", "content": "3", "tool_call_id": "a"},
        {"role": "tool", "content": "4", "tool_call_id": "a"},
    ]
    system, user, assistant, results = as_text(said, TOOLS)
    assert system["role"] == "system"
    assert user == said[0]
    assert assistant == {"role": "assistant", "content": f"Well.\n{ADD}"}
    response = "<tool_response>\n{}\n</tool_response>"
    assert results == {"role": "user", "content": response.format(3) + "\n" + response.format(4)}
    assert as_text(said[:1], ()) == said[:1]


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {"type": "string", "pattern": "(" * 1000}}},
        {"properties": {"a": {"$ref": "#/nowhere"}}},
        {"properties": {"a": {"enum": ["x" * 200_000]}}},
        {"properties": {"\ud800": {"const": "\ud800"}}, "required": ["\ud800"]},
    ],
)
def test_a_schema_that_cannot_be_enforced_names_its_tool(grammars, schema):
    use = ToolUse((*TOOLS, Tool("bomb", {"type": "object", **schema})))
    start = time.monotonic()
    with pytest.raises(InputError, match=r"^tool 'bomb': the JSON schema cannot be enforced"):
        constraint_of(use, grammars)
    assert time.monotonic() - start < 60  # hours, if it were let through


def test_many_large_schemas_are_too_much(grammars):
    schema = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}}
    use = ToolUse(tuple(Tool(f"t{i}", schema) for i in range(10)))
    with pytest.raises(InputError, match=r"the grammar cannot be enforced: it has"):
        constraint_of(use, grammars)
    assert np.all(constraint_of(ToolUse(TOOLS), grammars)(()).shape == (256,))
