"""States that clients keep on the server, by an id that nobody can guess."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from dataclasses import dataclass

from anymamba.runtime.state import State
from anymamba.server.errors import ApiError


@dataclass(frozen=True)
class Stored:
    """A state, and the model that it belongs to by the server's name."""

    model: str
    state: State


class StoredStates:
    """States by id, within a budget of memory. None is thrown away unasked.

    Args:
        most_bytes: of all of them together.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._states: OrderedDict[str, Stored] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """What they take."""
        return sum(stored.state.nbytes for stored in self._states.values())

    def add(self, model: str, state: State) -> str:
        """Keep a state; return its id.

        Raises:
            ApiError: there is no room for it.
        """
        self.check_room(state.nbytes)
        name = f"state-{secrets.token_urlsafe(18)}"
        self._states[name] = Stored(model, state)
        return name

    def check_room(self, nbytes: int) -> None:
        """Refuse what would not fit.

        Raises:
            ApiError: there is no room for so much.
        """
        if self.nbytes + nbytes > self._most_bytes:
            raise ApiError(
                507,
                f"states take {self.nbytes} of {self._most_bytes} bytes, no room for "
                f"{nbytes} more: delete some, or start the server with more",
                code="out_of_memory",
            )

    def get(self, name: str) -> Stored:
        """The state of this id.

        Raises:
            ApiError: there is none.
        """
        if name not in self._states:
            raise ApiError(404, f"there is no state {name[:100]!r}", "state", "state_not_found")
        return self._states[name]

    def remove(self, name: str) -> None:
        """Forget a state.

        Raises:
            ApiError: there is none.
        """
        self.get(name)
        del self._states[name]
