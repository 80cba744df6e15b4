"""Responses that clients may ask for again, or go on from."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anymamba.runtime.chat.model_template import Message
from anymamba.server.errors import ApiError


@dataclass(frozen=True)
class StoredResponse:
    """A response, and the conversation up to its end."""

    body: dict[str, Any]
    messages: Sequence[Message]
    nbytes: int


class StoredResponses:
    """Responses by id, within a budget of memory; the least recently used goes first.

    What the model has read of them is in the prefix cache, and need not be read again as long as
    it is there.

    Args:
        most_bytes: of all of them together.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes, self._bytes = most_bytes, 0
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()

    def add(self, body: dict[str, Any], messages: Sequence[Message]) -> None:
        """Keep a response, unless it alone is too large."""
        nbytes = len(json.dumps([body, messages]))
        if nbytes > self._most_bytes:
            return
        self._responses[body["id"]] = StoredResponse(body, messages, nbytes)
        self._bytes += nbytes
        while self._bytes > self._most_bytes:
            _, oldest = self._responses.popitem(last=False)
            self._bytes -= oldest.nbytes

    def get(self, id: str, param: str | None = None) -> StoredResponse:
        """The response of this id.

        Raises:
            ApiError: there is none, or none any more.
        """
        if id not in self._responses:
            message = (
                f"there is no response {id[:100]!r}: it was not stored, was deleted, or had to "
                "make room for newer ones"
            )
            raise ApiError(404, message, param, "response_not_found")
        self._responses.move_to_end(id)
        return self._responses[id]

    def remove(self, id: str) -> None:
        """Forget a response.

        Raises:
            ApiError: there is none.
        """
        self._bytes -= self.get(id).nbytes
        del self._responses[id]
