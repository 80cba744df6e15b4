"""`anymamba chat`: a conversation, its state, its forks."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from anymamba.cli.chat.conversation import Conversation
from anymamba.errors import InputError
from anymamba.runtime.chat.model_template import ChatTemplate
from anymamba.runtime.loading import load
from tests.support.cli import buffered
from tests.support.reference import greedy


@pytest.fixture
def chat(tiny, typed, anymamba):
    """Types lines; the answers are objects, each of six greedy tokens."""

    def run(*lines, options=(), model=tiny):
        data = "".join(line + "\n" for line in lines).encode()
        typed(data)
        always = ("--model", model, "--temperature", 0, "--max-new-tokens", 6, "--json")
        return anymamba("chat", *always, *options)

    return run


def answers(done):
    assert done.status == 0, done.err
    return [json.loads(line)["new_tokens"] for line in done.out.splitlines()]


def reading(folder, data, length=6):
    """What the model writes after some bytes."""

    class Bytes(str):
        def encode(self, *arguments):
            return data

    return greedy(folder, Bytes(), length)


def test_what_is_typed_continues_the_text_on_a_new_line(tiny, chat):
    first, second = answers(chat("To be", "or not"))
    assert first == greedy(tiny, "To be", 6)
    joint = b"" if first[-1] == ord("\n") else b"\n"
    assert second == reading(tiny, b"To be" + bytes(first) + joint + b"or not")


def test_answers_are_shown_as_they_come_and_end_their_line(tiny, typed, anymamba):
    typed(b"ROMEO:\n")
    done = anymamba("chat", "--temperature", 0, "--max-new-tokens", 20)
    whole = anymamba("generate", "ROMEO:", "--temperature", 0, "--max-new-tokens", 20)
    assert done.out == whole.out
    assert done.err.splitlines() == [
        "the bundled model only continues plays; anymamba models lists models that chat",
        "[cut off after 20 tokens; -n allows more]",
    ]


def test_a_state_is_saved_and_gone_on_from(tmp_path, chat):
    state, more = tmp_path / "a.state", tmp_path / "b.state"
    one, two = answers(chat("To be", "or not"))
    done = chat("To be", f"/save {state}")
    assert answers(done) == [one]
    assert f"saved 11 tokens in {state}" in done.err
    # What was read before is not known: the message begins a new line all the same.
    assert one[-1] != ord("\n")
    count = 11 + len("\nor not") + 6
    loaded = chat(f"/load {state}", "or not", f"/save {more}")
    begun = chat("or not", f"/save {more}", options=("--state", state))
    for done in (loaded, begun):
        assert answers(done) == [two]
        assert f"saved {count} tokens" in done.err


def test_a_fork_can_be_returned_to(chat):
    one, two, three = answers(chat("To be", "or not", "that is"))
    done = chat(
        "To be", "/fork", "or not", "/fork", "that is", "/back", "that is", "/back", "or not"
    )
    assert answers(done) == [one, two, three, three, two]
    assert "forks left: 0" in done.err
    assert "there is no fork" in chat("/back").err


def test_a_reset_returns_to_the_beginning(tmp_path, chat):
    one, two = answers(chat("To be", "or not"))
    assert answers(chat("To be", "/reset", "To be", "or not")) == [one, one, two]
    state = tmp_path / "a.state"
    assert answers(chat("To be", f"/save {state}")) == [one]
    lines = (f"/load {state}", "or not", "/reset", "or not")
    assert answers(chat(*lines)) == [two, two]


def test_help_and_the_end(chat):
    done = chat("/help", "/quit", "To be")
    assert (done.status, done.out) == (0, "")
    assert "/fork" in done.err


def test_two_slashes_are_one(tiny, chat):
    assert answers(chat("//etc")) == [greedy(tiny, "/etc", 6)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("/fly", "/fly"),
        ("/save", "needs the name of a file"),
        ("/save ./nowhere/a.state", "nowhere"),
        ("/load ./nowhere.state", "nowhere"),
    ],
)
def test_a_mistake_in_a_pipe_ends_the_program(line, reason, chat):
    done = chat(line, "To be")
    assert reason in done.complaint


def test_a_terminal_is_told_and_the_chat_goes_on(tiny, monkeypatch, anymamba):
    lines = iter(["/fly", "To be"])

    def read_line(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("anymamba.cli.chat.input.line_reader", lambda history: read_line)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    done = anymamba("chat", "--model", tiny, "--temperature", 0, "--max-new-tokens", 6, "--json")
    assert answers(done) == [greedy(tiny, "To be", 6)]
    assert "plain continuation" in done.err
    assert "anymamba: there is no command /fly" in done.err


def test_a_seed_repeats_the_conversation(tiny, typed, anymamba):
    def run(seed):
        typed(b"a\nb\n")
        return anymamba("chat", "--model", tiny, "--seed", seed, "--max-new-tokens", 9).out

    assert run(1) == run(1) != run(2)


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def with_template(tiny, tmp_path):
    pytest.importorskip("jinja2")
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)

    def write(template):
        (folder / "chat_template.jinja").write_text(template)
        return folder

    return write


def test_a_template_writes_the_conversation_down(with_template, chat):
    folder = with_template(TEMPLATE)
    text = b"<user>To be<end><assistant>"
    first, second = answers(chat("To be", "or not", model=folder))
    assert first == reading(folder, text)
    # The answer is written down as text: bytes that are none have become others.
    said = bytes(first).decode(errors="replace").encode()
    assert second == reading(folder, text + said + b"<end><user>or not<end><assistant>")
    plain = answers(chat("To be", model=folder, options=("--no-template",)))
    assert plain == [reading(folder, b"To be")]


def test_a_template_that_rewrites_what_was_said_is_followed(with_template, chat):
    """As some do that show only the last answer's thoughts."""
    folder = with_template("{{ messages | length }}:{{ messages[-1].content }}>")
    first, second = answers(chat("To be", "or not", model=folder))
    assert first == reading(folder, b"1:To be>")
    assert second == reading(folder, b"3:or not>")


@pytest.mark.parametrize("template", ["{% for", "{{ 1 / 0 }}", "{{ raise_exception('no') }}"])
def test_a_broken_template_is_refused(template, with_template, chat):
    assert "template" in chat("To be", model=with_template(template)).complaint


# Earlier messages are written otherwise once there is one after them, so all is read anew.
REWRITES = "{{ messages|length }}:{% for m in messages %}[{{ m.content }}]{% endfor %}"


@pytest.mark.parametrize("template", [None, ChatTemplate(REWRITES, {})])
@pytest.mark.parametrize("elsewhere", ["load", "load and say", "load and fork", "reset"])
def test_a_fork_belongs_to_its_conversation(template, elsewhere, tmp_path):
    engine = load()
    other = tmp_path / "other.state"
    engine.prefill(engine.state(), "x" * 100).save(other)

    def said(away):
        settings = {"temperature": 0, "max_new_tokens": 3}
        conversation = Conversation(engine, engine.state(), settings, template)
        conversation.say("hello", lambda piece: None)
        conversation.fork()
        if "load" in away:
            conversation.load(str(other))
        if "say" in away:
            conversation.say("there", lambda piece: None)
        if "fork" in away:
            conversation.fork()
            conversation.back()
            assert conversation.token_count == 100
            conversation.reset()
            assert conversation.token_count == 100
        if away == "reset":
            conversation.reset()
            assert conversation.token_count == 0
        conversation.back()
        reply = conversation.say("again", lambda piece: None)
        count = conversation.token_count
        conversation.reset()
        return reply.ids, count, conversation.token_count

    assert said(elsewhere) == said("")


class Interrupting:
    """Presses Ctrl-C when so many pieces were shown."""

    def __init__(self, after):
        self.left = after
        self.text = ""

    def __call__(self, piece):
        self.text += piece
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_ctrl_c_keeps_what_was_shown():
    engine = load()
    settings = {"temperature": 0, "max_new_tokens": 50}
    conversation = Conversation(engine, engine.state(), settings, None)
    show = Interrupting(after=10)
    reply = conversation.say("ROMEO:", show)
    assert reply.ended_by == "interrupt"
    assert reply.text == show.text
    assert len(reply.ids) == 10
    assert conversation.token_count == 6 + 10
    # The conversation goes on as if the answer had ended there.
    other = Conversation(engine, engine.state(), settings, None)
    other.say("ROMEO:" + reply.text, lambda piece: None)
    whole = engine.generate(f"ROMEO:{reply.text}\nJULIET:", **settings).text
    assert conversation.say("JULIET:", lambda piece: None).text == whole


def test_ctrl_c_before_the_answer_leaves_the_conversation_as_it_was(monkeypatch):
    engine = load()
    conversation = Conversation(engine, engine.state(), {"max_new_tokens": 5}, None)

    def interrupted(prompt, *, state, **settings):
        engine.prefill(state, prompt[:3])
        raise KeyboardInterrupt
        yield

    conversation.say("ROMEO:", lambda piece: None)
    before = conversation.token_count
    with monkeypatch.context() as patch:
        patch.setattr(engine, "stream", interrupted)
        assert conversation.say("JULIET:", lambda piece: None).ended_by == "interrupt"
    assert conversation.token_count == before


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_ctrl_c_at_an_answer_in_a_pipe_ends_the_program(tiny):
    command = [sys.executable, "-m", "anymamba", "chat", "--model", str(tiny), "--json"]
    process = subprocess.Popen(
        [*command[:-1], "--max-new-tokens", "100000000"],
        env=buffered(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        process.stdin.write(b"a\n")
        process.stdin.flush()
        assert process.stdout.read(10)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, err) == (130, b"")


@pytest.mark.skipif(os.name != "posix", reason="terminals are POSIX's")
def test_in_a_terminal(tiny):
    """A prompt, an answer, and the end."""
    import pty

    primary, secondary = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "anymamba", "chat", "--max-new-tokens", "5", "--temperature", "0"],
        env=os.environ | {"TERM": "dumb"},
        stdin=secondary,
        stdout=secondary,
        stderr=subprocess.PIPE,
        close_fds=True,
    )
    os.close(secondary)
    try:
        os.write(primary, b"ROMEO:\n/quit\n")
        err = process.stderr.read().decode()
        assert process.wait(timeout=60) == 0
        shown = os.read(primary, 10_000).decode()
    finally:
        process.kill()
        os.close(primary)
    assert "bundled, plain continuation" in err
    assert "> " in shown
    engine = load()
    assert engine.generate("ROMEO:", max_new_tokens=5).text in shown.replace("\r\n", "\n")


def test_a_line_that_is_no_text_does_not_end_a_chat_on_a_terminal(tiny, monkeypatch, anymamba):
    lines = iter([InputError("what was typed is not UTF-8 text"), "To be", EOFError()])

    def read_line(prompt):
        line = next(lines)
        if isinstance(line, Exception):
            raise line
        return line

    monkeypatch.setattr("anymamba.cli.chat.input.line_reader", lambda history: read_line)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    done = anymamba("chat", "--model", tiny, "--temperature", 0, "--max-new-tokens", 6, "--json")
    assert "not UTF-8" in done.err
    assert answers(done) == [greedy(tiny, "To be", 6)]


def test_the_last_message_is_answered_anew(chat):
    one, two = answers(chat("To be", "or not"))
    greedy_again = chat("To be", "or not", "/retry", "/retry")
    assert answers(greedy_again) == [one, two, two, two]

    hot = ("--temperature", 2, "--seed", 7)
    first, second, third, after = answers(chat("To be", "/retry", "/retry", "so", options=hot))
    assert len({tuple(first), tuple(second), tuple(third)}) == 3
    (other_seed,) = answers(chat("To be", options=("--temperature", 2, "--seed", 8)))
    assert second == other_seed
    # What follows goes on from the answer that was given last.
    assert answers(chat("To be", "/retry", "/retry", "so", options=hot))[-1] == after
    assert answers(chat("To be", "so", options=hot))[-1] != after


@pytest.mark.parametrize("lines", [("/retry",), ("To be", "/reset", "/retry")])
def test_without_an_answer_there_is_none_to_give_anew(lines, chat):
    done = chat(*lines)
    assert done.status == 2
    assert "no answer to give anew" in done.err


def test_retry_after_ctrl_c_keeps_what_was_said(monkeypatch):
    engine = load()
    conversation = Conversation(engine, engine.state(), {"max_new_tokens": 4, "seed": 0}, None)
    conversation.say("To be", lambda _: None)
    before = conversation.token_count

    def interrupted(*_, **__):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(type(engine), "stream", interrupted)
    assert conversation.retry(lambda _: None).ids == []
    assert conversation.token_count == before


def test_a_system_message_comes_first(with_template, chat):
    folder = with_template(TEMPLATE)
    system = ("--system", "Be brief.")
    (answer,) = answers(chat("To be", model=folder, options=system))
    prompt = b"<system>Be brief.<end><user>To be<end><assistant>"
    assert answer == reading(folder, prompt)
    assert answers(chat("To be", "/reset", "To be", model=folder, options=system)) == [answer] * 2
    assert "needs a chat template" in chat("To be", options=system).complaint


def test_an_answer_that_was_cut_off_is_marked(tiny, typed, anymamba):
    typed(b"To be\n")
    done = anymamba("chat", "--model", tiny, "--temperature", 0, "-n", 6)
    assert done.err == "[cut off after 6 tokens; -n allows more]\n"
    typed(b"To be\n")
    end = greedy(tiny, "To be", 1)[0]
    done = anymamba("chat", "--model", tiny, "--temperature", 0, "-n", 6, "--stop-id", end)
    assert done.err == ""


def test_the_bundled_model_says_that_it_continues_plays(typed, anymamba):
    typed(b"")
    assert "only continues plays" in anymamba("chat").err.splitlines()[0]
