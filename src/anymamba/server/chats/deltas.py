"""An answer of a conversation as it comes: text, and calls of tools."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from anymamba.runtime.chat.tool_calls import CallPart, ToolCallParser
from anymamba.runtime.chat.tools import BEGIN, END
from anymamba.runtime.generation import TokenOutput
from anymamba.server.answers import Answers
from anymamba.server.chats.turn import Turn

Ending = Literal["eos", "stop", "length", "calls"]
"""Why an answer ended: by itself, at a stop string, at its most tokens, to call tools."""


@dataclass(frozen=True)
class Delta:
    """What a token brings to an answer.

    Args:
        place: which answer it belongs to.
        piece: the token.
        text: of the answer; empty where it belongs to a call.
        calls: parts of calls.
        ending: on the last one, why the answer has ended.
    """

    place: int
    piece: TokenOutput
    text: str
    calls: Sequence[CallPart] = ()
    ending: Ending | None = None


@dataclass
class Call:
    """A call of a tool, as far as it was written."""

    name: str
    arguments: str = ""
    is_whole: bool = False

    @property
    def parsed(self) -> dict[str, Any]:
        """The arguments of a whole call."""
        found: dict[str, Any] = json.loads(self.arguments)
        return found


@dataclass
class Said:
    """A whole answer."""

    text: str = ""
    calls: list[Call] = field(default_factory=list)
    pieces: list[TokenOutput] = field(default_factory=list)
    ending: Ending = "length"
    stop_string: str | None = None

    def add(self, delta: Delta) -> None:
        """Go on with what a token has brought."""
        self.text += delta.text
        self.pieces.append(delta.piece)
        for part in delta.calls:
            if part.name is not None:
                self.calls.append(Call(part.name))
            self.calls[part.index].arguments += part.arguments
            self.calls[part.index].is_whole |= part.is_last
        if delta.ending is not None:
            self.ending, self.stop_string = delta.ending, delta.piece.stop_string


async def deltas(turn: Turn, answers: Answers) -> AsyncIterator[Delta]:
    """All answers, a token at a time."""
    readers = [_Reader(turn) for _ in range(turn.n)]
    async for place, piece in answers.tokens():
        yield readers[place].read(place, piece)


async def collect(turn: Turn, answers: Answers) -> list[Said]:
    """All answers, once they have ended."""
    said = [Said() for _ in range(turn.n)]
    async for delta in deltas(turn, answers):
        said[delta.place].add(delta)
    return said


def new_id(kind: str) -> str:
    """An id that nobody can guess."""
    return f"{kind}_{secrets.token_hex(16)}"


class _Reader:
    """Reads the tokens of one answer."""

    def __init__(self, turn: Turn) -> None:
        may_call = turn.tools is not None and bool(turn.tools.callable)
        self._parser = ToolCallParser() if may_call else None
        self._has_called = False
        # Where a mark is a special token, it has no text.
        find = turn.engine.tokenizer.token_to_id
        skips = turn.engine.detokenize
        ids = {mark: find(mark) for mark in (BEGIN, END)} if may_call else {}
        self._marks = {id: mark for mark, id in ids.items() if id is not None and not skips([id])}

    def read(self, place: int, piece: TokenOutput) -> Delta:
        ending: Ending | None = piece.finish_reason
        if self._parser is None:
            return Delta(place, piece, piece.text, (), ending)
        text, calls = "", []
        for part in self._parser.add(piece.text + self._marks.get(piece.ids[0], "")):
            if isinstance(part, str):
                text += part
            else:
                calls.append(part)
        self._has_called |= any(part.is_last for part in calls)
        if ending is not None:
            text += self._parser.finish()
            ending = "calls" if ending == "eos" and self._has_called else ending
        return Delta(place, piece, text, calls, ending)
