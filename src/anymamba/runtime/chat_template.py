"""Running a model's chat template: a program in Jinja, written by whoever made the model.

It runs in Jinja's sandbox, which keeps it from files and from the insides of Python, and sees
nothing but texts. The sandbox does not keep it from taking long, or much memory. What it may use
beside plain Jinja is what Transformers offers, for which templates are written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NoReturn

from anymamba.checkpoint.wording import shown
from anymamba.errors import CheckpointError, InputError, MissingDependencyError

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["render"]

# Before this one the sandbox had holes (CVE-2025-27516).
_FIRST_SAFE = (3, 1, 6)
_INSTALL = "pip install 'anymamba[chat]'"
# What Python raises in a template that adds a number to a text, and the like.
_PROGRAM_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
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
        CheckpointError: the template is broken.
        MissingDependencyError: jinja2 is not installed, or is too old to be safe.

    Example:
        >>> template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\\n{% endfor %}"
        >>> render(template, [{"role": "user", "content": "Hi"}], True, {})
        'user: Hi\\n'
    """
    plain = [_plain(message) for message in messages]
    compiled = _compiled(template)
    from jinja2 import TemplateError

    try:
        return compiled.render(
            messages=plain,
            add_generation_prompt=bool(add_generation_prompt),
            tools=None,
            documents=None,
            **special_tokens,
        )
    except _Refused as error:
        raise InputError(f"the model's chat template refuses the messages: {error}") from None
    except (TemplateError, *_PROGRAM_ERRORS) as error:
        raise CheckpointError(f"the chat template fails: {shown(str(error))}") from error


class _Refused(Exception):
    """What a template raises on purpose."""


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


@lru_cache(maxsize=4)
def _compiled(template: str) -> Template:
    _require_jinja()
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Reads the marks around the assistant's words, which matter in training only."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    try:
        return environment.from_string(template)
    except (TemplateError, RecursionError) as error:
        raise CheckpointError(f"the chat template is broken: {shown(str(error))}") from error


def _require_jinja() -> None:
    try:
        import jinja2  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "jinja2":
            raise
        raise MissingDependencyError(
            f"chat templates need the package 'jinja2', which is not installed: {_INSTALL}"
        ) from error
    installed = version("jinja2")
    if tuple(int(part) for part in installed.split(".")[:3] if part.isdigit()) < _FIRST_SAFE:
        raise MissingDependencyError(
            f"jinja2 is {installed}, whose sandbox can be escaped from, expected "
            f"{'.'.join(map(str, _FIRST_SAFE))} or later: {_INSTALL}"
        )


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    # Jinja's own filter writes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _refuse(message: object) -> NoReturn:
    raise _Refused(str(message))


def _now(format: str) -> str:
    return datetime.now().strftime(format)
