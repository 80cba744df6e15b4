"""Telling text and calls of tools apart, in an answer as it comes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from anymamba.runtime.chat.tools import BEGIN, END

_NAME = '\n{"name": "'
_ARGUMENTS = '", "arguments": '
_LAST = "}\n" + END


@dataclass(frozen=True)
class CallPart:
    """A part of a call.

    Args:
        index: which call of the answer it is.
        name: whom it calls, in its first part; None later.
        arguments: more of its arguments, which are JSON.
        is_last: whether the call is whole now.
    """

    index: int
    name: str | None = None
    arguments: str = ""
    is_last: bool = False


class ToolCallParser:
    """Parts of an answer that a grammar of `tool_grammar` has formed.

    Example:
        >>> parser = ToolCallParser()
        >>> list(parser.add("Well.\\n<tool_"))
        ['Well.']
        >>> for part in parser.add('call>\\n{"name": "f", "arguments": {}}\\n</tool_call>'):
        ...     print(part)
        CallPart(index=0, name='f', arguments='', is_last=False)
        CallPart(index=0, name=None, arguments='{}', is_last=False)
        CallPart(index=0, name=None, arguments='', is_last=True)
    """

    def __init__(self) -> None:
        self._left = ""
        self._index = -1  # of the call
        self._place = self._text

    def add(self, text: str) -> Iterator[str | CallPart]:
        """What more of the text brings: text to show, and parts of calls."""
        self._left += text
        while (part := self._place()) is not None:
            if part != "":
                yield part

    def finish(self) -> str:
        """What was held back of the text, as it might have become a call."""
        left = self._left if self._place == self._text and self._index < 0 else ""
        self._left = ""
        return left

    def _text(self) -> str | CallPart | None:
        """Between calls. A line break before a call belongs to it."""
        found = self._left.find(BEGIN)
        if found < 0:
            return None if self._index >= 0 else self._shown(_held(self._left, "\n" + BEGIN, BEGIN))
        before = self._left[:found].removesuffix("\n") if self._index < 0 else ""
        self._left = self._left[found + len(BEGIN) :]
        self._index += 1
        self._place = self._name
        return before

    def _name(self) -> str | CallPart | None:
        end = self._left.find(_ARGUMENTS)
        if end < 0:
            return None
        name = self._left[len(_NAME) : end]
        self._left = self._left[end + len(_ARGUMENTS) :]
        self._place = self._arguments
        return CallPart(self._index, name)

    def _arguments(self) -> str | CallPart | None:
        # JSON of one line has no line break: this one ends it.
        end = self._left.find(_LAST)
        if end == 0:
            self._left = self._left[len(_LAST) :]
            self._place = self._text
            return CallPart(self._index, is_last=True)
        more = self._shown(end if end > 0 else _held(self._left, _LAST))
        return more and CallPart(self._index, None, more)

    def _shown(self, end: int) -> str | None:
        """What is certain of what is left, and so is taken away; None if nothing is."""
        shown, self._left = self._left[:end], self._left[end:]
        return shown or None


def _held(text: str, *marks: str) -> int:
    """Where the end of a text begins that may become one of some marks."""
    most = max(map(len, marks))
    for start in range(max(0, len(text) - most + 1), len(text)):
        if any(mark.startswith(text[start:]) for mark in marks):
            return start
    return len(text)
