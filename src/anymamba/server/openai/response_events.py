"""The typed events of a response that is streamed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

from anymamba.errors import AnyMambaError
from anymamba.runtime.chat.tool_calls import CallPart
from anymamba.server.answers import Answers
from anymamba.server.chats.deltas import Delta, Said, deltas, new_id
from anymamba.server.chats.turn import Turn
from anymamba.server.errors import ApiError, as_api_error
from anymamba.server.openai.response_output import (
    Reply,
    call_item,
    message_item,
    status_of,
    text_part,
)
from anymamba.server.sse import EventForm

EVENTS = EventForm(has_names=True, ping=b": ping\n\n", end=b"", error=ApiError.body)
_Event = dict[str, Any]


async def events(turn: Turn, reply: Reply, answers: Answers) -> AsyncIterator[_Event]:
    """All events of a response, numbered."""
    number = 0
    async for event in _unnumbered(turn, reply, answers):
        yield {**event, "sequence_number": number}
        number += 1


async def _unnumbered(turn: Turn, reply: Reply, answers: Answers) -> AsyncIterator[_Event]:
    for name in ("created", "in_progress"):
        yield {"type": f"response.{name}", "response": reply.body("in_progress")}
    said, items = Said(), _Items(reply)
    try:
        async for delta in deltas(turn, answers):
            said.add(delta)
            for event in items.add(delta):
                yield event
    except AnyMambaError as error:
        found = as_api_error(error).body()["error"]
        yield {"type": "error", **{name: found[name] for name in ("code", "message", "param")}}
        return
    for event in items.finish(said):
        yield event
    body = reply.finish(said, answers.usage, items.output)
    yield {"type": f"response.{body['status']}", "response": body}


class _Items:
    """The items of an answer as it comes, of which one is open at a time."""

    def __init__(self, reply: Reply) -> None:
        self.output: list[dict[str, Any]] = []
        self._reply = reply
        self._logprobs: list[dict[str, Any]] = []
        self._is_open = False

    def add(self, delta: Delta) -> Iterator[_Event]:
        """What a token brings."""
        if delta.text:
            yield from self._add_text(delta)
        for part in delta.calls:
            yield from self._add_call(part)

    def finish(self, said: Said) -> Iterator[_Event]:
        """What ends the last item; an answer of nothing is an empty text."""
        if not self.output:
            yield from self._begin_text()
        if self._is_open:
            is_text = self.output[-1]["type"] == "message"
            yield from self._end(is_text and said.ending != "length")

    def _add_text(self, delta: Delta) -> Iterator[_Event]:
        if not self.output:
            yield from self._begin_text()
        found = self._reply.logprobs_of([delta.piece])
        self._logprobs += found
        self.output[-1]["content"][0]["text"] += delta.text
        yield self._of_part("output_text.delta", delta=delta.text, logprobs=found)

    def _begin_text(self) -> Iterator[_Event]:
        item = message_item(new_id("msg"), "in_progress")
        yield from self._begin(item)
        self.output[-1] = {**item, "content": [text_part("")]}
        yield self._of_part("content_part.added", part=text_part(""))

    def _add_call(self, part: CallPart) -> Iterator[_Event]:
        if part.name is not None:
            if self._is_open:
                yield from self._end(True)
            yield from self._begin(call_item(new_id("fc"), new_id("call"), part.name))
        if part.arguments:
            item = self.output[-1]
            self.output[-1] = {**item, "arguments": item["arguments"] + part.arguments}
            yield self._of_item("function_call_arguments.delta", delta=part.arguments)
        if part.is_last:
            yield from self._end(True)

    def _begin(self, item: dict[str, Any]) -> Iterator[_Event]:
        self.output.append(item)
        self._is_open = True
        yield {
            "type": "response.output_item.added",
            "output_index": len(self.output) - 1,
            "item": item,
        }

    def _end(self, is_whole: bool) -> Iterator[_Event]:
        item = self.output[-1]
        item = {**item, "status": status_of(is_whole)}
        if item["type"] == "message":
            text = item["content"][0]["text"]
            part = text_part(text, self._logprobs)
            item["content"] = [part]
            yield self._of_part("output_text.done", text=text, logprobs=self._logprobs)
            yield self._of_part("content_part.done", part=part)
        else:
            yield self._of_item(
                "function_call_arguments.done", name=item["name"], arguments=item["arguments"]
            )
        self.output[-1], self._is_open = item, False
        index = len(self.output) - 1
        yield {"type": "response.output_item.done", "output_index": index, "item": item}

    def _of_item(self, kind: str, **more: object) -> _Event:
        place = {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1}
        return {"type": f"response.{kind}", **place, **more}

    def _of_part(self, kind: str, **more: object) -> _Event:
        return self._of_item(kind, content_index=0, **more)
