"""Chat templates, beside Transformers' rendering of the same."""

import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from anymamba.errors import CheckpointError, InputError, MissingDependencyError
from anymamba.runtime.chat import template as chat_template
from anymamba.runtime.chat.rendering import MOST_CHARACTERS, MOST_COPIES
from anymamba.runtime.chat.template import Renderer, render
from tests.support import processes

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'Is 1 < 2 & "so on"?'},
    {"role": "assistant", "content": "  é😀\n"},
    {"role": "user", "content": "{{ messages }} {% break %}"},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{% endif %}
"""
WITH_TOKENS = """\
{{ bos_token }}{% for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- if message.role == 'user' %}[INST] {{ message.content | trim }} [/INST]
    {%- else %}{% generation %} {{ message.content }}{{ eos_token }}{% endgeneration %}{% endif %}
{%- endfor %}"""
AS_JSON = "{{ messages | tojson }} {{ messages | tojson(indent=2) }} {{ tools is none }}"
NAMESPACE = """\
{% set ns = namespace(last='') %}{% for message in messages %}
{% set ns.last = message.content %}{% endfor %}{{ ns.last }} {{ dict(a=1).a }} {{ unk_token }}"""


@pytest.mark.parametrize("template", [CHATML, WITH_TOKENS, AS_JSON, NAMESPACE, "", "plain\n"])
@pytest.mark.parametrize("messages", [CHAT, CHAT[1:3], []])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_it_is_the_text_that_transformers_makes(template, messages, add_generation_prompt):
    [expected], _ = render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=add_generation_prompt, **SPECIAL
    )
    assert render(template, messages, add_generation_prompt, SPECIAL) == expected


def test_templates_know_the_day():
    text = render("{{ strftime_now('%Y') }}", [], True, {})
    assert re.fullmatch(r"20\d\d", text)


def test_the_message_with_which_a_template_refuses_reaches_the_user():
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match=r"template refuses the messages: roles must alternate"):
        render(template, CHAT, True, {})


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{ messages",
        "{% unknown %}",
        "{% generation %}",
        "(" * 2000 + "{{" + "(" * 2000 + "1" + ")" * 2000 + "}}",
    ],
)
def test_a_broken_template(template):
    with pytest.raises(CheckpointError, match=r"^the chat template is broken: "):
        render(template, CHAT, True, {})


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages + 1 }}",
        "{{ 1 / 0 }}",
        "{{ nothing.at.all }}",
        "{% include 'other' %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__.json }}",
        "{{ ('%s' | attr('format'))('x') and ''['__class__']['__mro__'] }}",
        "{% set _ = messages.append(1) %}",
        "{{ range(1000000000) | list }}",
    ],
)
def test_a_template_that_fails_or_reaches_out_of_the_sandbox(template):
    with pytest.raises(CheckpointError, match=r"^the chat template fails: ") as raised:
        render(template, CHAT, True, {})
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) ~ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "{{ 7 ** (10 ** 8) }}",
        "{{ lipsum(n=10 ** 7) }}",
    ],
)
def test_a_template_that_takes_too_long_is_ended(template, monkeypatch):
    monkeypatch.setattr(chat_template, "MOST_SECONDS", 1.0)
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=r"template fails: .*takes longer than 1 seconds"):
        render(template, CHAT, True, {})
    # Long after, as others may want the processor too; by itself each would take an hour.
    assert time.monotonic() - start < 60


DOUBLING = """\
{% set ns = namespace(text='x') %}{% for _ in range(60) %}
{% set ns.text = ns.text ~ ns.text %}{% endfor %}"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="others do not keep count")
@pytest.mark.parametrize(
    "template",
    [
        DOUBLING,
        "{{ 'x' * 10 ** 11 }}",
        "{{ 'x'.ljust(10 ** 11) }}",
        "{{ '{:>100000000000}'.format(1) }}",
        "{{ 'x' | center(10 ** 11) }}",
        "{{ ('x' * 10 ** 6) | replace('x', 'y' * 10 ** 6) }}",
        "{{ [[0] * 10 ** 5] * 10 ** 10 }}",
    ],
)
def test_a_template_that_takes_too_much_memory_is_ended(template):
    with pytest.raises(CheckpointError, match=r"template fails: .*more than 1024 MB of memory"):
        render(template, CHAT, True, {})


def test_a_text_that_is_too_long():
    given = sum(len(text) for message in CHAT for text in message.values())
    most = MOST_CHARACTERS + MOST_COPIES * given
    with pytest.raises(CheckpointError, match=rf"fails: .*{most + 1} characters, more than {most}"):
        render(f"{{{{ 'x' * {most + 1} }}}}", CHAT, True, {})
    assert len(render(f"{{{{ 'é' * {most} }}}}", CHAT, True, {})) == most


def test_a_long_conversation_may_be_repeated_but_not_often():
    long = [{"role": "user", "content": "x" * 1_000_000}]
    assert len(render("{{ messages[0].content * 3 }}", long, True, {})) == 3_000_000
    with pytest.raises(CheckpointError, match=r"fails: .*characters, more than"):
        render("{{ messages[0].content * 6 }}", long, True, {})


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('ab' * 5000000) }}", "{{ 1 + ('ab' * 5000000) }}", "{% x %}"]
)
def test_what_it_says_is_short_and_without_control_characters(template):
    with pytest.raises((InputError, CheckpointError)) as raised:
        render(template.replace("ab", "a\x1b"), CHAT, True, {})
    assert len(str(raised.value)) < 5000
    assert "\x1b" not in str(raised.value)


def test_nothing_comes_from_the_folder_one_is_in(tmp_path, monkeypatch):
    for name in ("jinja2", "json", "datetime"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    assert render("{{ 1 }}", CHAT, True, {}) == "1"


def test_a_python_that_cannot_be_started(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(CheckpointError, match="cannot start '/nowhere/python'"):
        render("{{ 1 }}", CHAT, True, {})


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user"},
        {"content": "a"},
        {"role": "user", "content": None},
        {"role": "user", "content": ["a"]},
        {"role": "user", "content": "a", 1: "b"},
        "a",
        None,
    ],
)
def test_messages_of_another_form(message):
    with pytest.raises(InputError, match=r"^a message is .*, expected a dict of strings with role"):
        render(CHATML, [message], True, {})


def test_the_template_gets_plain_strings():
    class Loud(str):
        __slots__ = ()

        def shout(self):
            return self.upper()

    with pytest.raises(CheckpointError, match=r"no attribute 'shout'"):
        render("{{ messages[0].content.shout() }}", [{"role": "a", "content": Loud("b")}], True, {})


def test_without_jinja_the_error_says_what_to_install():
    program = (
        "import sys; sys.modules['jinja2'] = None\n"
        "from anymamba.runtime.chat.template import render\n"
        "from anymamba.errors import MissingDependencyError\n"
        "try: render('', [], True, {})\n"
        "except MissingDependencyError as error: print(error)\n"
    )
    done = processes.python("-c", program, check=True)
    assert "'jinja2', which is not installed: pip install 'anymamba[chat]'" in done.stdout


@pytest.mark.parametrize(
    ("version", "safe"),
    [("3.1.5", False), ("2.11", False), ("3.1.6", True), ("3.2", True), ("4.0.0rc1", True)],
)
def test_a_jinja_with_a_broken_sandbox_is_refused(monkeypatch, version, safe):
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    if safe:
        assert render("a", [], True, {}) == "a"
    else:
        with pytest.raises(
            MissingDependencyError, match=rf"jinja2 is {version}, .* 3\.1\.6 or later"
        ):
            render("a", [], True, {})


def kept_process(renderer):
    [kept] = renderer._idle
    return kept._process


def test_a_process_is_kept_for_the_next_conversation():
    renderer = Renderer("{{ messages[0].content }}{{ tools | length if tools else '' }}")
    renderer.start()
    first = kept_process(renderer)
    for text in ("a", "b\n", "\u2028é😀"):
        assert renderer.render([{"role": "user", "content": text}]) == text
        assert kept_process(renderer) is first
    assert renderer.render(CHAT, tools=[{}, {}]).endswith("2")
    renderer.close()
    assert first.poll() is not None
    assert renderer.render(CHAT) == CHAT[0]["content"]  # it starts another
    renderer.close()


def test_one_that_died_is_replaced():
    renderer = Renderer("{{ messages[0].content }}")
    assert renderer.render(CHAT) == "Be brief."
    kept_process(renderer).kill()
    assert renderer.render(CHAT) == "Be brief."
    renderer.close()


def test_a_hostile_template_leaves_nothing_for_the_next_conversation(monkeypatch):
    """Not in what it sees, and no process that took too long or too much."""
    renderer = Renderer(
        "{% set word = messages[0].content %}{% if word == 'loop' %}"
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
        "{% elif word == 'fill' %}{{ 'x' * 10 ** 11 }}{% endif %}"
        "{% if seen is defined %}leaked{% endif %}{% set seen = word %}{{ word }}"
    )

    def ask(word):
        return renderer.render([{"role": "user", "content": word}])

    assert [ask("a"), ask("b")] == ["a", "b"]
    first = kept_process(renderer)
    monkeypatch.setattr(chat_template, "MOST_SECONDS", 1.0)
    with pytest.raises(CheckpointError, match="takes longer than"):
        ask("loop")
    assert first.poll() is not None
    assert renderer._idle == []
    monkeypatch.undo()
    assert ask("c") == "c"
    if sys.platform.startswith("linux"):
        second = kept_process(renderer)
        with pytest.raises(CheckpointError, match="MB of memory"):
            ask("fill")
        assert second.poll() is not None
        assert ask("d") == "d"
    renderer.close()


def test_threads_share_a_renderer(monkeypatch):
    started = []
    start = chat_template._Process.__init__
    monkeypatch.setattr(
        chat_template._Process, "__init__", lambda self: started.append(1) or start(self)
    )
    monkeypatch.setattr(chat_template, "_PATIENCE", 30.0)
    renderer = Renderer("{{ messages[0].content }}")
    with ThreadPoolExecutor(4) as threads:
        texts = [str(number) for number in range(20)]
        chats = [[{"role": "user", "content": text}] for text in texts]
        assert list(threads.map(renderer.render, chats)) == texts
    assert len(renderer._idle) == len(started) == 1
    renderer.close()


def test_nobody_waits_long_for_a_slow_conversation(monkeypatch):
    monkeypatch.setattr(chat_template, "_PATIENCE", 0.01)
    renderer = Renderer("{{ messages[0].content }}")
    renderer._busy = 1  # somebody else's, which never comes back
    assert renderer.render(CHAT) == "Be brief."
    renderer.close()
