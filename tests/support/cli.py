"""What a command did, and how Python buffers where nothing is set."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def buffered() -> dict[str, str]:
    """An environment in which Python buffers its output, as it does where nothing is set."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@dataclass(frozen=True)
class Done:
    """What a command did."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The output, which must be one JSON value."""
        assert self.status == 0, self.err
        return json.loads(self.out)

    @property
    def complaint(self) -> str:
        """The error, which must be one line, with nothing on standard output."""
        assert self.status == 2
        assert self.out == ""
        assert self.err.startswith("anymamba: ")
        assert self.err.count("\n") == 1
        return self.err


Command = Callable[..., Done]
