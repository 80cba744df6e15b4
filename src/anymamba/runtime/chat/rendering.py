"""The program that runs a chat template, in a process of its own with little memory.

`template` starts it, gives it requests, a line each, reads a reply to each, and ends it where one
takes too long.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from jinja2 import Template

MOST_MEGABYTES = 1024
"""What the process may take, Python itself included, where the system keeps count."""

MOST_CHARACTERS = 1 << 18
"""How much text a template may add to what it is given: tokens of a text take memory too, in the
process that reads it."""

MOST_COPIES = 4
"""How often it may repeat what it is given."""

_MOST_REASON = 1000

_LAST_SECONDS = 60
"""When a request ends the process by itself, should nobody be there any more to end it."""

# What Python raises in a template that adds a number to a text, and the like.
_PROGRAM_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


def main() -> None:
    """Reply to each line of standard input by one of standard output, as far as memory goes."""
    _limit_memory()
    for line in sys.stdin.buffer:
        _limit_time(_LAST_SECONDS)
        try:
            reply = answer(json.loads(line))
        except MemoryError:
            reply = {"fails": f"it needs more than {MOST_MEGABYTES} MB of memory", "memory": ""}
        except RecursionError:
            reply = {"fails": "the messages are nested too deeply"}
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()
        _limit_time(0)
        if "memory" in reply:  # what is left of it is anybody's guess
            return


def _limit_time(seconds: int) -> None:
    if hasattr(signal, "alarm"):  # not on Windows
        signal.alarm(seconds)


def _limit_memory() -> None:
    # Windows has no such module, and macOS does not keep count.
    with suppress(ImportError, ValueError, OSError):
        import resource

        most = MOST_MEGABYTES << 20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def answer(request: Mapping[str, Any]) -> dict[str, str]:
    """Run a template.

    Args:
        request: its source as "template", and the names that it sees as "names".

    Returns:
        The text it makes as "text", or why there is none: "refuses", what it says of the messages;
        "broken", why it is no template; "fails", what goes wrong in it.

    Example:
        >>> answer({"template": "{{ a }}!", "names": {"a": "So"}})
        {'text': 'So!'}
    """
    from jinja2 import TemplateError

    try:
        template = _compiled(request["template"])
    except (TemplateError, RecursionError) as error:
        return {"broken": str(error)[:_MOST_REASON]}
    try:
        text = template.render(**request["names"])
    except _Refused as error:
        return {"refuses": str(error)[:_MOST_REASON]}
    except (TemplateError, *_PROGRAM_ERRORS) as error:
        return {"fails": str(error)[:_MOST_REASON]}
    most = MOST_CHARACTERS + MOST_COPIES * _given(request["names"])
    if len(text) > most:
        return {"fails": f"it makes a text of {len(text)} characters, more than {most}"}
    return {"text": text}


def _given(names: Mapping[str, Any]) -> int:
    """How many characters the template was given to write down."""
    values = [value for message in names.get("messages", ()) for value in message.values()]
    texts = (value if isinstance(value, str) else json.dumps(value) for value in values)
    tools = names.get("tools")
    return sum(map(len, texts)) + (len(json.dumps(tools)) if tools else 0)


class _Refused(Exception):
    """What a template raises on purpose."""


@lru_cache(maxsize=1)  # a process is asked for one template
def _compiled(source: str) -> Template:
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationOutput(Extension):
        """Reads the marks around the assistant's words, which matter in training only."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationOutput, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    return environment.from_string(source)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    # Jinja's own filter writes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _refuse(message: object) -> NoReturn:
    raise _Refused(str(message))


def _now(format: str) -> str:
    return datetime.now().strftime(format)
