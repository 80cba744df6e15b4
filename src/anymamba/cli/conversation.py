"""A conversation with a model: what was said, the state after it, and forks to come back to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anymamba.errors import InputError

if TYPE_CHECKING:
    from anymamba.cli.chat_template import ChatTemplate, Message
    from anymamba.runtime.engine import Engine
    from anymamba.runtime.generation import Piece
    from anymamba.runtime.state import State

__all__ = ["Conversation", "Reply"]


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
    """

    state: State
    messages: tuple[Message, ...] = ()
    text: str = ""


class Conversation:
    """Lets a model answer, and keeps the state after each answer.

    Without a template, what is typed continues the text: on a new line, if there is any text
    before it.

    Args:
        engine: the model.
        state: where to begin.
        settings: how the next token is chosen, and when a reply ends.
        template: how to write the conversation down; None to continue the text.
    """

    def __init__(
        self, engine: Engine, state: State, settings: dict[str, Any], template: ChatTemplate | None
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._template = template
        self._beginning = self._now = Moment(state)
        self._forks: list[Moment] = []

    @property
    def token_count(self) -> int:
        """How many tokens the state has read."""
        return self._now.state.token_count

    def say(self, message: str, show: Callable[[str], object]) -> Reply:
        """Let the model answer a message.

        Ctrl-C ends the answer where it is; what was shown then counts as said. Before the first
        token there is nothing to keep, and the message counts as never said.

        Args:
            message: what the user says.
            show: receives each piece of the answer.
        """
        messages = (*self._now.messages, {"role": "user", "content": message})
        before, prompt = self._written(messages)
        state = before.state.copy()
        listener = Listener(show)
        ids = self._ids(prompt, before)
        # Closed at once, so that the state has read all that was shown.
        with closing(self._engine.stream(ids, state=state, **self._settings)) as pieces:
            listener.listen(pieces)
        reply = listener.reply()
        if not reply.ids:
            return reply
        read = before.text + prompt + self._engine.detokenize(reply.ids, skip_special=False)
        answer = {"role": "assistant", "content": reply.text}
        self._now = Moment(state, (*messages, answer), read)
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
        return self._beginning, text

    def _ids(self, prompt: str, before: Moment) -> list[int]:
        # A template writes what special tokens there are to be.
        special = self._template is None and before.state.token_count == 0
        return self._engine.tokenize(prompt, special=special)

    def save(self, file: str) -> None:
        """Store the state."""
        self._now.state.save(file)

    def load(self, file: str) -> None:
        """Go on from a stored state, as if the conversation began there."""
        self._beginning = self._now = Moment(self._engine.load_state(file))

    def fork(self) -> int:
        """Remember this point; return how many are remembered."""
        self._forks.append(self._now)
        return len(self._forks)

    def back(self) -> int:
        """Return to the last point remembered, and forget it; return how many are left.

        Raises:
            InputError: there is none.
        """
        if not self._forks:
            raise InputError("there is no fork to go back to: /fork makes one")
        self._now = self._forks.pop()
        return len(self._forks)

    def reset(self) -> None:
        """Return to where the conversation began."""
        self._now = self._beginning


class Listener:
    """Collects the pieces of a reply, and shows them.

    Args:
        show: receives the text of each.
    """

    def __init__(self, show: Callable[[str], object]) -> None:
        self._ids: list[int] = []
        self._text = ""
        self._ended_by = "interrupt"
        self._show = show

    def listen(self, pieces: Iterable[Piece]) -> None:
        """Take all pieces there are, or those until Ctrl-C."""
        try:
            for piece in pieces:
                self._ids += piece.ids
                self._text += piece.text
                self._ended_by = piece.stopped_by or self._ended_by
                if piece.text:
                    self._show(piece.text)
        except KeyboardInterrupt:
            self._ended_by = "interrupt"

    def reply(self) -> Reply:
        """What came so far."""
        return Reply(self._text, self._ids, self._ended_by)
