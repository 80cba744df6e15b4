"""States as files that outlive the program: written in the background, checked when read.

A file's name tells how many tokens were read, which they were, and by which weights in which
arithmetic; its content is what `State.save` writes, atomically, so that after a crash each file is
whole or not there.
"""

from __future__ import annotations

import logging
import os
import queue
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

from anymamba.checkpoint.io import user_path
from anymamba.errors import CheckpointError, InputError, StateError
from anymamba.runtime.state import Identity, State, load_state

_NAME = re.compile(r"(\d+)-([0-9a-f]{64})-([0-9a-f]{16}(?:-[0-9a-z]+)+)\.safetensors")
_LOGGER = logging.getLogger("anymamba.server")
# States that wait to be written: so many, or more if they take so few bytes. Where the disk is
# slower than that, one is not kept as a file.
_MOST_WAITING, _MOST_WAITING_BYTES = 64, 64 << 20
_WRITERS = 4  # a disk takes long to say that a file is safe, and says it of several at once


class StateFolder:
    """A folder of states within a budget of bytes: the last used stay.

    Args:
        path: the folder, made where it is not there.
        most_bytes: of all files together.
        on_error: called with what went wrong where a state could not be written, by default
            logged, once a minute at most.

    Raises:
        CheckpointError: the folder cannot be made or read.
        InputError: the budget is negative.

    Example:
        >>> import tempfile
        >>> import anymamba
        >>> engine, folder = anymamba.load(), StateFolder(tempfile.mkdtemp(), 1 << 30)
        >>> key = (6, "0" * 64)
        >>> folder.write(key, engine.prefill(engine.state(), "ROMEO:"))
        >>> folder.close()
        >>> folder.read(key, engine.identity)
        State(6 tokens, 173 kB)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        most_bytes: int,
        on_error: Callable[[Exception], object] | None = None,
    ) -> None:
        if most_bytes < 0:
            raise InputError(f"the cache's folder is {most_bytes} bytes, expected 0 or more")
        self.path = user_path(path)
        self.most_bytes = most_bytes
        self._on_error = on_error or _Log()
        self._lock = threading.Lock()
        self._sizes: dict[str, int] = {}  # by name, the least recently used first
        self._nbytes = 0  # of all of them
        self._counts: dict[str, Counter[int]] = {}  # by model, how many files of each length
        self._find_files()
        self._waiting: queue.Queue[tuple[str, State] | None] = queue.Queue()
        self._waiting_bytes = 0
        self._writers = [
            threading.Thread(target=self._write_all, name="states", daemon=True)
            for _ in range(_WRITERS)
        ]
        for writer in self._writers:
            writer.start()

    def counts(self, identity: Identity) -> set[int]:
        """How many tokens the states have that this model may go on from."""
        with self._lock:
            return set(self._counts.get(_model_of(identity), ()))

    def read(self, key: tuple[int, str], identity: Identity) -> State | None:
        """The state of a text, or None where there is none.

        Raises:
            StateError: the file is broken, or belongs to another model. It is removed.
        """
        name = _name_of(key, identity)
        with self._lock:
            if name not in self._sizes:
                return None
            self._sizes[name] = self._sizes.pop(name)
        try:
            state = load_state(self.path / name, identity)
            if state.token_count != key[0] or state.logits is None:
                raise StateError(f"{name} has read other tokens than its name says")
        except StateError:
            self._remove(name)
            raise
        with suppress(OSError):  # another process may have removed it meanwhile
            os.utime(self.path / name)
        return state

    def write(self, key: tuple[int, str], state: State) -> None:
        """Write a state in the background, unless it is there already."""
        name = _name_of(key, state.identity)
        with self._lock:
            if name in self._sizes:
                return
            waiting = self._waiting_bytes + state.nbytes
            has_room = self._waiting.qsize() < _MOST_WAITING or waiting <= _MOST_WAITING_BYTES
            if has_room:
                self._waiting_bytes = waiting
                self._waiting.put((name, state))
        if not has_room:
            self._on_error(CheckpointError("the disk is too slow: a state was not written"))

    def close(self) -> None:
        """Wait until all states are written."""
        for _ in self._writers:
            self._waiting.put(None)
        for writer in self._writers:
            writer.join()

    def _find_files(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            stats = []
            for entry in os.scandir(self.path):
                if _NAME.fullmatch(entry.name):
                    with suppress(FileNotFoundError):  # another server has removed it meanwhile
                        stats.append((entry.stat().st_mtime, entry.stat().st_size, entry.name))
        except OSError as error:
            raise CheckpointError(
                f"the cache's folder {str(self.path)!r} cannot be used: {error.strerror}"
            ) from error
        for _, size, name in sorted(stats):
            self._add(name, size)

    def _write_all(self) -> None:
        while (item := self._waiting.get()) is not None:
            try:
                self._write(*item)
            except Exception as error:  # a full disk, no memory: the next one may be written
                self._on_error(error)
            with self._lock:
                self._waiting_bytes -= item[1].nbytes
            del item  # its memory is free while this waits for the next

    def _write(self, name: str, state: State) -> None:
        state.save(self.path / name)
        size = (self.path / name).stat().st_size
        with self._lock:
            self._forget(name)
            self._add(name, size)
        self._stay_within_budget()

    def _stay_within_budget(self) -> None:
        while True:
            with self._lock:
                if self._nbytes <= self.most_bytes:
                    return
                oldest = next(iter(self._sizes))
            self._remove(oldest)

    def _remove(self, name: str) -> None:
        with self._lock:
            self._forget(name)
        with suppress(OSError):  # it may be gone, or not be ours to remove
            (self.path / name).unlink()

    def _add(self, name: str, size: int) -> None:
        count, model = _count_and_model(name)
        self._sizes[name] = size
        self._nbytes += size
        self._counts.setdefault(model, Counter())[count] += 1

    def _forget(self, name: str) -> None:
        if name not in self._sizes:
            return
        count, model = _count_and_model(name)
        self._nbytes -= self._sizes.pop(name)
        self._counts[model][count] -= 1
        if not self._counts[model][count]:
            del self._counts[model][count]


class _Log:
    """Logs errors, of those within a minute the first."""

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self, error: Exception) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + 60
            _LOGGER.warning("a state was not kept as a file: %s", error)


def _name_of(key: tuple[int, str], identity: Identity) -> str:
    count, tokens = key
    return f"{count}-{tokens}-{_model_of(identity)}.safetensors"


def _count_and_model(name: str) -> tuple[int, str]:
    """What a file's name says of it."""
    found = _NAME.fullmatch(name)
    assert found is not None
    return int(found[1]), found[3]


def _model_of(identity: Identity) -> str:
    """Which weights, and how they are multiplied: a text is to be the same after a restart."""
    return f"{identity.digest[:16]}-{identity.arithmetic}"
