"""The next turn of a conversation, whatever interface asks for it: from messages to requests."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request as HttpRequest

from anymamba.errors import AnyMambaError, InputError
from anymamba.runtime.chat.model_template import Message
from anymamba.runtime.chat.tool_grammar import ToolUse
from anymamba.runtime.engine import Engine
from anymamba.runtime.generation import Sampling
from anymamba.runtime.serving import Request
from anymamba.server.answers import Answers
from anymamba.server.errors import ApiError, as_api_error
from anymamba.server.sampling import for_row
from anymamba.server.service import Service, unless_gone

MOST_MESSAGES = 10_000


@dataclass(frozen=True)
class Turn:
    """What the model is to say next.

    Args:
        model: its name.
        engine: the model.
        messages: what was said.
        sampling: how it goes on; the form of the text and of calls is enforced there.
        tools: what it may call.
        n: how many answers there are to be.
        client: whose turn it is.
        beginning: how the answer begins, which the model goes on from.
    """

    model: str
    engine: Engine
    messages: Sequence[Message]
    sampling: Sampling
    tools: ToolUse | None = None
    n: int = 1
    client: str = ""
    beginning: str = ""


async def answer(http: HttpRequest, service: Service, turn: Turn) -> tuple[Answers, dict[str, str]]:
    """Let the model answer, as soon as it is its turn.

    Returns:
        The answers, of which the first has begun, and the response's headers.

    Raises:
        ApiError: there can be no answer.
    """
    ids, keep_at = await asyncio.to_thread(prompt_of, service, turn)
    requests = [
        Request(ids, for_row(turn.sampling), turn.model, turn.client, keep_at=keep_at, row=row)
        for row in range(turn.n)
    ]
    answers = Answers(service, requests)
    return answers, await unless_gone(http, answers.start())


def prompt_of(service: Service, turn: Turn) -> tuple[NDArray[np.int64], list[int]]:
    """A conversation as tokens, up to where the answer begins.

    Returns:
        The tokens; and after how many of them the instructions end, with which other conversations
        may begin too.

    Raises:
        ApiError: the model has no chat template, or it refuses the messages.
    """
    template = service.templates.get(turn.model)
    if template is None:
        raise ApiError(
            400,
            f"model {turn.model!r} has no chat template, so that nobody knows how it writes a "
            "conversation: use /v1/completions",
            "model",
            "no_chat_template",
        )
    try:
        tools = () if turn.tools is None else turn.tools.tools
        text = template.render(turn.messages, tools) + turn.beginning
        # A template writes what special tokens there are to be.
        ids = turn.engine.tokenize(text, special=False)
    except AnyMambaError as error:
        param = "messages" if isinstance(error, InputError) else None
        raise ApiError(as_api_error(error).status, str(error), param) from error
    if not ids:
        raise ApiError(400, "the messages make no text: say something in one of them", "messages")
    instructions = _instructions(text, turn)
    begin = turn.engine.tokenize(instructions, special=False) if instructions else []
    return np.array(ids, np.int64), [len(begin)] if begin and ids[: len(begin)] == begin else []


def _instructions(text: str, turn: Turn) -> str:
    """A conversation's text up to where what the system says first ends, as far as that shows.

    The tools are a part of it: what they are told in ends before the first who is not the system
    speaks.
    """
    leading = list(takewhile(lambda message: message["role"] == "system", turn.messages))
    said = leading[-1]["content"].strip() if leading else ""
    end = text.find(said) + len(said) if said in text else 0
    if turn.tools is not None and turn.tools.tools:
        last = f'"name": "{turn.tools.tools[-1].name}"'
        if (found := text.find("</tools>", text.find(last, end))) >= 0:
            end = found
    return text[:end]
