"""The program that runs a chat template, in a process of its own with little memory.

`template` starts it, gives it a request, reads a reply, and ends it where it takes too long.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
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
    """Read a request from standard input, and write the reply to standard output."""
    request = json.load(sys.stdin)
    _limit_memory()
    try:
        reply = answer(request)
    except MemoryError:
        reply = {"fails": f"it needs more than {MOST_MEGABYTES} MB of memory"}
    json.dump(reply, sys.stdout)


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
    given = sum(
        len(value) for message in request["names"].get("messages", ()) for value in message.values()
    )
    most = MOST_CHARACTERS + MOST_COPIES * given
    if len(text) > most:
        return {"fails": f"it makes a text of {len(text)} characters, more than {most}"}
    return {"text": text}


class _Refused(Exception):
    """What a template raises on purpose."""


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
