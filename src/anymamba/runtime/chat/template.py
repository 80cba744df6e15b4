"""Running a model's chat template: a program in Jinja, written by whoever made the model.

It runs in Jinja's sandbox, which keeps it from files and from the insides of Python, and sees
nothing but texts. The sandbox does not keep it from taking long, or much memory: a line of Jinja
can ask for more than any machine has. So it runs in a process of its own (`rendering`), which
may have so much and no more. To start one takes a tenth of a second; it is kept for the next time,
for the same template only. What a template may use beside plain Jinja is what Transformers offers,
for which templates are written.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

from anymamba.checkpoint.io import escaped, shown
from anymamba.errors import CheckpointError, InputError, MissingDependencyError

MOST_SECONDS = 10.0
"""How long a template may take."""

_PATIENCE = 0.2
"""How long a conversation waits for the kept process that writes another one, which takes a
thousandth of a second as a rule, before it starts one of its own."""

# Before this one the sandbox had holes (CVE-2025-27516).
_FIRST_SAFE = (3, 1, 6)
_INSTALL = "pip install 'anymamba[chat]'"
# The path first, so that nothing is imported from the folder that the user happens to be in.
_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[1:]; "
    "from anymamba.runtime.chat.rendering import main; main()"
)


class Renderer:
    """Writes conversations by one template. Threads may use it at the same time.

    A process is kept between two conversations; one that failed never is, so that each has the
    same bounds as the first.

    Args:
        template: the Jinja template.

    Example:
        >>> renderer = Renderer("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}")
        >>> [renderer.render([{"role": "user", "content": text}]) for text in ("Hi", "Ho")]
        ['user: Hi', 'user: Ho']
        >>> renderer.close()
    """

    def __init__(self, template: str) -> None:
        self._template = template
        self._idle: list[_Process] = []
        self._busy = 0
        self._lock = threading.Condition()
        weakref.finalize(self, _end, self._idle)

    def start(self) -> None:
        """Start a process now, so that the first conversation need not wait for it.

        Raises:
            MissingDependencyError, CheckpointError: as `render` does.
        """
        self._put_back(_Process())

    def close(self) -> None:
        """End the process that is kept. The next conversation starts one."""
        with self._lock:
            _end(self._idle)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        special_tokens: Mapping[str, str] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """Write a conversation as one text.

        Args:
            messages: dicts, each with the texts "role" and "content". One of the assistant may
                have "tool_calls", as OpenAI has them but with arguments that are an object.
            add_generation_prompt: whether the text ends where the assistant's answer begins.
            special_tokens: texts that the template can name, as "bos_token".
            tools: what can be called, as OpenAI describes it.

        Returns:
            The text.

        Raises:
            InputError: the messages have another form, or the template refuses them.
            CheckpointError: the template is broken, takes too long or too much memory.
            MissingDependencyError: jinja2 is not installed, or is too old to be safe.
        """
        names: dict[str, Any] = {
            "messages": [_plain(message) for message in messages],
            "add_generation_prompt": bool(add_generation_prompt),
            "tools": list(tools) or None,
            "documents": None,
        }
        names |= special_tokens or {}
        try:
            line = json.dumps({"template": self._template, "names": names}).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"the messages or tools are not JSON: {str(error)[:200]}") from None
        reply = self._ask(line)
        if "refuses" in reply:
            refusal = escaped(reply["refuses"])
            raise InputError(f"the model's chat template refuses the messages: {refusal}")
        if "broken" in reply:
            raise CheckpointError(f"the chat template is broken: {shown(reply['broken'])}")
        if "text" not in reply:
            raise CheckpointError(f"the chat template fails: {shown(reply['fails'])}")
        return reply["text"]

    def _ask(self, line: bytes) -> dict[str, str]:
        with self._lock:
            self._lock.wait_for(lambda: self._idle or not self._busy, _PATIENCE)
            kept = self._idle.pop() if self._idle else None
            self._busy += 1
        try:
            return self._ask_one(kept, line)
        finally:
            with self._lock:
                self._busy -= 1
                self._lock.notify()

    def _ask_one(self, kept: _Process | None, line: bytes) -> dict[str, str]:
        """Ask the kept process, or a new one where there is none or it cannot answer."""
        if kept is not None:
            reply = kept.ask(line)
            if reply is not None and "memory" not in reply:
                self._put_back(kept)
                return reply
            if kept.took_too_long:
                return kept.failure()
        # The kept one died, or had less memory left than a new one has.
        process = _Process()
        reply = process.ask(line)
        if reply is None:
            return process.failure()
        self._put_back(process)
        return reply

    def _put_back(self, process: _Process) -> None:
        with self._lock:
            if process.is_alive and not self._idle:
                self._idle.append(process)
                self._lock.notify()
                return
        process.end()


class _Process:
    """A process that runs a template.

    Raises:
        MissingDependencyError: jinja2 is not installed, or is too old to be safe.
        CheckpointError: it cannot be started.
    """

    def __init__(self) -> None:
        _require_jinja()
        self.took_too_long = False
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, *sys.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:
            raise CheckpointError(
                f"cannot start {sys.executable!r} to run the chat template: {error.strerror}"
            ) from error

    @property
    def is_alive(self) -> bool:
        """Whether it can be asked again."""
        return self._process.poll() is None

    def ask(self, line: bytes) -> dict[str, str] | None:
        """What it replies; None where it died or took too long, and is ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        alarm = threading.Timer(MOST_SECONDS, self._give_up)
        alarm.daemon = True
        alarm.start()
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
            found = self._process.stdout.readline()
        except OSError:  # it is gone
            found = b""
        finally:
            alarm.cancel()
        if found.endswith(b"\n") and not self.took_too_long:
            reply: dict[str, str] = json.loads(found)
            if "memory" in reply:
                self.end()
            return reply
        self.end()
        return None

    def failure(self) -> dict[str, str]:
        """Why it did not reply."""
        if self.took_too_long:
            return {"fails": f"it takes longer than {MOST_SECONDS:.0f} seconds"}
        return {"fails": f"its process ends with status {self._process.returncode}"}

    def end(self) -> None:
        """End it, and close its pipes."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()

    def _give_up(self) -> None:
        self.took_too_long = True
        self._process.kill()


def _end(processes: list[_Process]) -> None:
    while processes:
        processes.pop().end()


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    special_tokens: Mapping[str, str],
) -> str:
    """Write one conversation by a template, as `Renderer.render` does.

    Example:
        >>> template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\\n{% endfor %}"
        >>> render(template, [{"role": "user", "content": "Hi"}], True, {})
        'user: Hi\\n'
    """
    renderer = Renderer(template)
    try:
        return renderer.render(messages, add_generation_prompt, special_tokens)
    finally:
        renderer.close()


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    fits = (
        isinstance(message, Mapping)
        and {"role", "content"} <= message.keys()
        and all(
            isinstance(name, str) and (isinstance(value, str) or name == "tool_calls")
            for name, value in message.items()
        )
    )
    if not fits:
        raise InputError(
            f"a message is {shown(message)}, expected a dict of strings with role and content"
        )
    return dict(message)  # what it holds is plain once it was JSON


def _require_jinja() -> None:
    if find_spec("jinja2") is None:
        raise MissingDependencyError(
            f"chat templates need the package 'jinja2', which is not installed: {_INSTALL}"
        )
    from importlib.metadata import version  # slow, and most starts need no template

    installed = version("jinja2")
    if tuple(int(part) for part in installed.split(".")[:3] if part.isdigit()) < _FIRST_SAFE:
        raise MissingDependencyError(
            f"jinja2 is {installed}, whose sandbox can be escaped from, expected "
            f"{'.'.join(map(str, _FIRST_SAFE))} or later: {_INSTALL}"
        )
