"""A server in a process of its own, as a user starts it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["OurServer", "TheirServer"]

_SECONDS = 120.0


class _Server:
    """A process that answers at a port until it is told to end."""

    port: int

    def __init__(self, *command: object, stderr: int = subprocess.DEVNULL) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *(str(part) for part in command)],
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End it, and wait until it has."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def memory(self) -> int:
        """The bytes of memory that it has."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        found = re.search(r"RssAnon:\s+(\d+) kB", status)
        assert found is not None
        return 1024 * int(found[1])


class OurServer(_Server):
    """`anymamba serve`, from its first line on."""

    def __init__(self, *options: object) -> None:
        super().__init__("-m", "anymamba", "serve", "--port", 0, *options, stderr=subprocess.PIPE)
        assert self.process.stderr is not None
        said = self.process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", said)
        if found is None:
            raise RuntimeError(f"the server does not start: {said}{self.process.stderr.read()}")
        self.port = int(found[1])
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health") as answer:
            answer.read()


class TheirServer(_Server):
    """llama-cpp-python's server, once it lists its model.

    Args:
        model: a GGUF file.
        port: a free one.
        threads: how many compute.
    """

    def __init__(self, model: Path, port: int, threads: int) -> None:
        options = {"model": model, "port": port, "n_threads": threads, "n_threads_batch": threads}
        # Else a request ends the one before, and logits of all positions are kept.
        options |= {"interrupt_requests": False, "logits_all": False, "verbose": False}
        parts = [part for name, value in options.items() for part in (f"--{name}", value)]
        super().__init__("-m", "llama_cpp.server", *parts)
        self.port = port
        until = time.monotonic() + _SECONDS
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as answer:
                    answer.read()
                return
            except OSError as error:
                if time.monotonic() > until or self.process.poll() is not None:
                    self.stop()
                    raise RuntimeError("llama-cpp-python's server does not start") from error
                time.sleep(0.05)
