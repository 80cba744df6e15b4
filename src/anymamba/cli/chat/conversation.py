"""A conversation with a model: what was said, the state after it, and forks to come back to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from anymamba.cli.summary import ended_by
from anymamba.errors import InputError

if TYPE_CHECKING:
    from anymamba.runtime.chat.model_template import ChatTemplate, Message
    from anymamba.runtime.engine import Engine
    from anymamba.runtime.generation import TokenOutput
    from anymamba.runtime.state import State


@dataclass(frozen=True)
class Reply:
    """What the model said: its text and tokens, and what ended it.

    `ended_by` is "stop", "end" or "length" as for `generate`, or "interrupt" after Ctrl-C.
    """

    text: str
    ids: list[int]
    ended_by: str


@dataclass(frozen=True)
class Moment:
    """A point of a conversation. Its state is advanced by nobody: who goes on takes a copy.

    Args:
        state: after all that was said.
        messages: what was said.
        text: what the state has read since the conversation began, special tokens included.
        first: where the conversation began; None where it begins here.
        before: the point before the last message; None where there is no message to answer anew.
    """

    state: State
    messages: tuple[Message, ...] = ()
    text: str = ""
    first: Moment | None = None
    before: Moment | None = None

    @property
    def beginning(self) -> Moment:
        """Where the conversation that this belongs to began."""
        return self if self.first is None else self.first


class Conversation:
    """Lets a model answer, and keeps the state after each answer.

    Without a template, what is typed continues the text: on a new line, if there is any text
    before it.

    Args:
        engine: the model.
        state: where to begin.
        settings: how the next token is chosen, and when a reply ends.
        template: how to write the conversation down; None to continue the text.
        system: a system message to begin with, or None.

    Raises:
        InputError: there is a system message, and no template to write it down.
    """

    def __init__(
        self,
        engine: Engine,
        state: State,
        settings: dict[str, Any],
        template: ChatTemplate | None,
        system: str | None = None,
    ) -> None:
        if system is not None and template is None:
            raise InputError(
                "a system message needs a chat template, and this model comes without one: begin "
                "with a text instead (anymamba ingest, then --state)"
            )
        self._engine = engine
        self._settings = settings
        self._template = template
        begun = () if system is None else ({"role": "system", "content": system},)
        self._now = Moment(state, begun)
        self._forks: list[Moment] = []
        self._retries = 0

    @property
    def token_count(self) -> int:
        """How many tokens the state has read."""
        return self._now.state.token_count

    def say(self, message: str, show: Callable[[str], object]) -> Reply:
        """Let the model answer a message.

        Ctrl-C ends the answer where it is; what was shown then counts as said. Before the first
        token there is nothing to keep, and the message counts as never said. `show` receives the
        text of the answer as it comes.
        """
        return self._answer(message, show, self._settings)

    def retry(self, show: Callable[[str], object]) -> Reply:
        """Let the model answer the last message anew, with other random numbers."""
        answered = self._now
        if answered.before is None:
            raise InputError("there is no answer to give anew: say something first")
        self._retries += 1
        settings = dict(self._settings)
        if settings.get("seed") is not None:
            settings["seed"] += self._retries
        self._now = answered.before
        reply = None
        try:
            reply = self._answer(answered.messages[-2]["content"], show, settings)
        finally:
            if reply is None or not reply.ids:  # what was said before stays
                self._now = answered
        return reply

    def _answer(
        self, message: str, show: Callable[[str], object], settings: dict[str, Any]
    ) -> Reply:
        messages = (*self._now.messages, {"role": "user", "content": message})
        before, prompt = self._written(messages)
        state = before.state.copy()
        # A template writes what special tokens there are to be.
        special = self._template is None and state.token_count == 0
        ids = self._engine.tokenize(prompt, special=special)
        # Closed at once, so that the state has read all that was shown.
        with closing(self._engine.stream(ids, state=state, **settings)) as pieces:
            reply = listen(pieces, show)
        if not reply.ids:
            return reply
        read = before.text + prompt + self._engine.detokenize(reply.ids, skip_special=False)
        answer = {"role": "assistant", "content": reply.text}
        # Of the points before, one is enough: each holds a state.
        last = replace(self._now, before=None)
        self._now = Moment(state, (*messages, answer), read, self._now.beginning, last)
        return reply

    def _written(self, messages: tuple[Message, ...]) -> tuple[Moment, str]:
        """From where to go on, and the text to read first."""
        now = self._now
        if self._template is None:
            # Of a state from a file, what it has read is not known, only that there is something.
            begun = now.state.token_count > 0 and not now.text.endswith("\n")
            new_line = "\n" if begun else ""
            return now, new_line + messages[-1]["content"]
        text = self._template.render(messages)
        if text.startswith(now.text):
            return now, text[len(now.text) :]
        # The template writes earlier messages otherwise now that there is one after them.
        return now.beginning, text

    def save(self, file: str) -> None:
        """Store the state."""
        self._now.state.save(file)

    def load(self, file: str) -> None:
        """Go on from a stored state, as if the conversation began there.

        Forks of the conversation before stay: to go back to one returns to that conversation.
        """
        self._now = Moment(self._engine.load_state(file))

    def fork(self) -> int:
        """Remember this point; return how many are remembered."""
        self._forks.append(self._now)
        return len(self._forks)

    def back(self) -> int:
        """Return to the last point remembered, and forget it; return how many are left."""
        if not self._forks:
            raise InputError("there is no fork to go back to: /fork makes one")
        self._now = self._forks.pop()
        return len(self._forks)

    def reset(self) -> None:
        """Return to where the conversation began."""
        self._now = self._now.beginning


def listen(pieces: Iterable[TokenOutput], show: Callable[[str], object]) -> Reply:
    """All pieces of a reply, or those until Ctrl-C, each shown as it comes."""
    ids: list[int] = []
    text, ended = "", "interrupt"
    try:
        for piece in pieces:
            ids += piece.ids
            text += piece.text
            if piece.finish_reason is not None:
                ended = ended_by(piece.finish_reason)
            if piece.text:
                show(piece.text)
    except KeyboardInterrupt:
        ended = "interrupt"
    return Reply(text, ids, ended)
