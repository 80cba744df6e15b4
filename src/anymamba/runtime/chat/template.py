"""Running a model's chat template: a program in Jinja, written by whoever made the model.

It runs in Jinja's sandbox, which keeps it from files and from the insides of Python, and sees
nothing but texts. The sandbox does not keep it from taking long, or much memory: a line of Jinja
can ask for more than any machine has. So it runs in a process of its own (`rendering`), which
may have so much and no more. To start one takes a tenth of a second. What a template may use beside
plain Jinja is what Transformers offers, for which templates are written.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from anymamba.checkpoint.io import escaped, shown
from anymamba.errors import CheckpointError, InputError, MissingDependencyError

MOST_SECONDS = 10.0
"""How long a template may take."""

# Before this one the sandbox had holes (CVE-2025-27516).
_FIRST_SAFE = (3, 1, 6)
_INSTALL = "pip install 'anymamba[chat]'"
# The path first, so that nothing is imported from the folder that the user happens to be in.
_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[1:]; "
    "from anymamba.runtime.chat.rendering import main; main()"
)


def render(
    template: str,
    messages: Sequence[Mapping[str, str]],
    add_generation_prompt: bool,
    special_tokens: Mapping[str, str],
) -> str:
    """Write a conversation as one text.

    Args:
        template: the Jinja template.
        messages: dicts of strings, each with a "role" and a "content".
        add_generation_prompt: whether the text ends where the assistant's answer begins.
        special_tokens: texts that the template can name, as "bos_token".

    Returns:
        The text.

    Raises:
        InputError: the messages have another form, or the template refuses them.
        CheckpointError: the template is broken, takes too long or too much memory.
        MissingDependencyError: jinja2 is not installed, or is too old to be safe.

    Example:
        >>> template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\\n{% endfor %}"
        >>> render(template, [{"role": "user", "content": "Hi"}], True, {})
        'user: Hi\\n'
    """
    names: dict[str, Any] = {
        "messages": [_plain(message) for message in messages],
        "add_generation_prompt": bool(add_generation_prompt),
        "tools": None,
        "documents": None,
    }
    _require_jinja()
    reply = _ask({"template": template, "names": names | dict(special_tokens)})
    if "refuses" in reply:
        refusal = escaped(reply["refuses"])
        raise InputError(f"the model's chat template refuses the messages: {refusal}")
    if "broken" in reply:
        raise CheckpointError(f"the chat template is broken: {shown(reply['broken'])}")
    if "text" not in reply:
        raise CheckpointError(f"the chat template fails: {shown(reply['fails'])}")
    return reply["text"]


def _ask(request: Mapping[str, Any]) -> dict[str, str]:
    """What the process replies, or what is to be said of one that does not."""
    command = [sys.executable, "-c", _PROGRAM, *sys.path]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(request).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=MOST_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"fails": f"it takes longer than {MOST_SECONDS:.0f} seconds"}
    except OSError as error:
        raise CheckpointError(
            f"cannot start {sys.executable!r} to run the chat template: {error.strerror}"
        ) from error
    if done.returncode != 0:
        return {"fails": f"its process ends with status {done.returncode}"}
    reply: dict[str, str] = json.loads(done.stdout)
    return reply


def _plain(message: Mapping[str, str]) -> dict[str, str]:
    fits = (
        isinstance(message, Mapping)
        and {"role", "content"} <= message.keys()
        and all(isinstance(text, str) for pair in message.items() for text in pair)
    )
    if not fits:
        raise InputError(
            f"a message is {shown(message)}, expected a dict of strings with role and content"
        )
    # A subclass of str could bring methods along that the sandbox knows nothing of.
    return {str.__str__(name): str.__str__(text) for name, text in message.items()}


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
