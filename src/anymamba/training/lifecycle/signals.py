"""Signals that end a training run after the step that is under way."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

_NAMES = ("SIGTERM", "SIGINT", "SIGBREAK")  # the last is Windows' alone
_STOPPING = [signal.Signals[name] for name in _NAMES if name in signal.Signals.__members__]


class StopSignals:
    """While it is entered, SIGTERM and Ctrl-C ask for an end after the step, and end nothing.

    On Windows, where nothing sends SIGTERM to another process, Ctrl-Break does the same. A second
    Ctrl-C ends at once. Only the main thread can do this; elsewhere it does nothing.

    Attributes:
        received: the first signal that came, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _STOPPING:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number)
