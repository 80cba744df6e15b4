"""A response of `/v1/responses`, as it begins and as it ends."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from anymamba.runtime.chat.model_template import Message
from anymamba.runtime.engine import Engine
from anymamba.runtime.generation import Sampling, TokenOutput
from anymamba.server.answers import Usage
from anymamba.server.chats.deltas import Said, new_id
from anymamba.server.chats.tool_fields import call_of
from anymamba.server.errors import ApiError
from anymamba.server.openai import logprobs
from anymamba.server.stored_responses import StoredResponses


@dataclass(frozen=True)
class Reply:
    """What a response says of its request, and where it is kept.

    Args:
        id: the response's.
        model, engine: the model, by its name and itself.
        created_at: when, in seconds since 1970.
        said: the conversation without the instructions, which are for this answer only.
        previous: the response that this one goes on from.
        instructions: what the system says.
        most_tokens: how many tokens the answer may have, where the request says.
        store: where the response is kept, if it is.
        sampling: how tokens are chosen.
        parallel: whether there may be several calls.
        described: the fields "tools", "tool_choice" and "text" as they were given.
        metadata, user: what the client wants to find again.
    """

    id: str
    model: str
    engine: Engine
    created_at: int
    said: Sequence[Message]
    previous: str | None
    instructions: str | None
    most_tokens: int | None
    store: StoredResponses | None
    sampling: Sampling = field(default_factory=Sampling)
    parallel: bool = True
    described: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    user: str | None = None

    def body(self, status: str, output: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """The response's JSON."""
        text = self.described.get("text") or {}
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created_at,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": self.instructions,
            "max_output_tokens": self.most_tokens,
            "model": self.model,
            "output": list(output),
            "parallel_tool_calls": self.parallel,
            "previous_response_id": self.previous,
            "store": self.store is not None,
            "temperature": self.sampling.temperature,
            "top_p": 1.0 if self.sampling.top_p is None else self.sampling.top_p,
            "text": {"format": {"type": "text"}, **text},
            "tool_choice": self.described.get("tool_choice") or "auto",
            "tools": self.described.get("tools") or [],
            "truncation": "disabled",
            "background": False,
            "usage": None,
            "user": self.user,
            "metadata": self.metadata,
        }

    def check(self) -> None:
        """Refuse what could not be sent back.

        Raises:
            ApiError: a text has half of a character.
        """
        try:
            json.dumps(self.body(""), ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ApiError(400, "the request has half of a character in a text") from None

    def finish(
        self, said: Said, usage: Usage, output: Sequence[dict[str, Any]] | None = None
    ) -> dict[str, Any]:
        """The whole response, which is kept if it is to be."""
        output = self.output(said) if output is None else output
        is_cut = said.ending == "length"
        body = self.body("incomplete" if is_cut else "completed", output)
        if is_cut:
            body["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            body["completed_at"] = int(time.time())
        body["usage"] = usage_body(usage)
        if self.store is not None:
            self.store.add(body, [*self.said, _as_message(output)])
        return body

    def output(self, said: Said) -> list[dict[str, Any]]:
        """The items of an answer."""
        items = []
        if said.text or not said.calls:
            item = message_item(new_id("msg"), status_of(said.ending != "length" or said.calls))
            part = text_part(said.text, self.logprobs_of(said.pieces))
            items.append({**item, "content": [part]})
        for call in said.calls:
            item = call_item(new_id("fc"), new_id("call"), call.name)
            status = status_of(call.is_whole)
            items.append({**item, "arguments": call.arguments, "status": status})
        return items

    def logprobs_of(self, pieces: Sequence[TokenOutput]) -> list[dict[str, Any]]:
        """Tokens' log-probabilities, if they are asked for."""
        if self.sampling.top_logprobs is None:
            return []
        found: list[dict[str, Any]] = logprobs.of_chat(self.engine, pieces)["content"]
        return found


def status_of(is_whole: object) -> str:
    """The status of an item that has ended."""
    return "completed" if is_whole else "incomplete"


def message_item(id: str, status: str) -> dict[str, Any]:
    """An item of text, which has no part yet."""
    return {"id": id, "type": "message", "role": "assistant", "status": status, "content": []}


def text_part(text: str, logprobs: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """The part of such an item."""
    found = {"logprobs": list(logprobs)}
    return {"type": "output_text", "text": text, "annotations": [], **found}


def call_item(id: str, call_id: str, name: str) -> dict[str, Any]:
    """An item that is a call, which has no arguments yet."""
    return {
        "id": id,
        "type": "function_call",
        "call_id": call_id,
        "name": name,
        "arguments": "",
        "status": "in_progress",
    }


def usage_body(usage: Usage) -> dict[str, Any]:
    """How many tokens were read and written."""
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt + usage.completion,
    }


def _as_message(output: Sequence[dict[str, Any]]) -> Message:
    """The answer as the next turn has it."""
    message: Message = {"role": "assistant", "content": ""}
    calls = []
    for item in output:
        if item["type"] == "message":
            message["content"] = "".join(part["text"] for part in item["content"])
        elif item["status"] == "completed":
            calls.append(call_of(item["call_id"], item["name"], json.loads(item["arguments"])))
    return {**message, "tool_calls": calls} if calls else message
