"""The fields of a request's body, each checked, and none ignored."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from starlette.requests import ClientDisconnect, Request

from anymamba.checkpoint.io import shown
from anymamba.server.errors import ApiError


async def read_fields(request: Request, most_bytes: int) -> Fields:
    """Read a request's JSON object.

    Raises:
        ApiError: it is larger than allowed (413), not a JSON object (400),
            or not said to be JSON (415).
    """
    # A page of another site cannot send this type without asking the browser first.
    check_type(request, "application/json")
    data = await read_bytes(request, most_bytes, "the request's body")
    try:
        body = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"the request's body is not valid JSON: {reason[:200]}") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"the request's body is {shown(body)}, expected a JSON object")
    return Fields(body)


async def read_bytes(request: Request, most_bytes: int, name: str) -> bytes:
    """What a request sends; no more of it is read than may be.

    Raises:
        ApiError: it is larger (413; `name` is what the message calls it), or the client goes.
    """
    data = bytearray()
    try:
        async for part in request.stream():
            data += part
            if len(data) > most_bytes:
                message = f"{name} is larger than {most_bytes} bytes, the most that may be"
                raise ApiError(413, message)
    except ClientDisconnect:  # nobody hears it, and it is no fault that a log should show
        raise ApiError(499, "the client has closed the connection") from None
    return bytes(data)


def check_type(request: Request, expected: str) -> None:
    """Refuse a body of another type.

    Raises:
        ApiError: the header says another, or none (415).
    """
    given = request.headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() != expected:
        message = f"the header content-type is {shown(given)}, expected {expected!r}: send that"
        raise ApiError(415, message, code="unsupported_media_type")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


class Fields:
    """Takes fields out of a JSON object one by one; what is left at the end is refused.

    A field that is null counts as absent, as with OpenAI.

    Args:
        body: the object.
        where: what to put before a field's name in messages, for an object within another.
    """

    def __init__(self, body: dict[str, Any], where: str = "") -> None:
        self._left = {name: value for name, value in body.items() if value is not None}
        self._where = where

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str, default: Any = None) -> Any:
        """A field of any type, whose value somebody else checks."""
        return self._left.pop(name, default)

    def peek(self, name: str) -> Any:
        """A field that is taken later; None where it is absent."""
        return self._left.get(name)

    def text(self, name: str, default: str | None = None) -> str | None:
        """A string."""
        found: str | None = self._of(
            name, default, lambda value: isinstance(value, str), "a string"
        )
        return found

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        found: bool = self._of(
            name, default, lambda value: isinstance(value, bool), "true or false"
        )
        return found

    def number(
        self, name: str, low: float, high: float, default: float | None = None
    ) -> float | None:
        """A number from `low` to `high`."""
        found = self._of(
            name,
            default,
            lambda value: _is_number(value) and low <= value <= high,
            f"a number from {low:g} to {high:g}",
        )
        return found if found is None else float(found)

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int | None:
        """A whole number from `low` to `high`."""
        found: int | None = self._of(
            name,
            default,
            lambda value: type(value) is int and low <= value <= high,
            f"a whole number from {low} to {high}",
        )
        return found

    def choice(self, name: str, choices: tuple[str, ...], default: str | None = None) -> str | None:
        """One of several strings."""
        found: str | None = self._of(
            name,
            default,
            lambda value: isinstance(value, str) and value in choices,
            " or ".join(map(repr, choices)),
        )
        return found

    def inner(self, name: str) -> Fields | None:
        """An object within this one."""
        found = self._of(name, None, lambda value: isinstance(value, dict), "an object")
        return found if found is None else Fields(found, f"{self._where}{name}.")

    def objects(self, name: str, most: int) -> list[Fields]:
        """A list of objects."""
        found = self._of(
            name,
            [],
            lambda value: (
                isinstance(value, list)
                and len(value) <= most
                and all(isinstance(item, dict) for item in value)
            ),
            f"a list of at most {most} objects",
        )
        return [Fields(item, f"{self._where}{name}[{i}].") for i, item in enumerate(found)]

    def refuse(self, name: str, value: object, expected: str) -> ApiError:
        """What is said of a wrong value."""
        param = self._where + name
        return ApiError(400, f"{param} is {shown(value)}, expected {expected}", param)

    def require(self, name: str, expected: str) -> None:
        """Refuse where a field is absent."""
        if name not in self._left:
            raise ApiError(
                400, f"{self._where}{name} is missing, expected {expected}", self._where + name
            )

    def only(self, name: str, value: object, why: str) -> None:
        """Take a field that may have this one value; another is not supported."""
        found = self._left.pop(name, value)
        if found != value or isinstance(found, bool) != isinstance(value, bool):
            param = self._where + name
            raise ApiError(
                400,
                f"{param} is {shown(found)}, which is not supported: {why}",
                param,
                "unsupported",
            )

    def done(self) -> None:
        """Refuse what nobody asked for: nothing is ignored in silence."""
        for name in self._left:
            param = (self._where + name)[:100]
            message = f"{shown(param)} is not a field that is supported here: leave it out"
            raise ApiError(400, message, param, "unsupported")

    def _of(self, name: str, default: Any, fits: Callable[[Any], bool], expected: str) -> Any:
        if name not in self._left:
            return default
        value = self._left.pop(name)
        if not fits(value):
            raise self.refuse(name, value, expected)
        return value


def _is_number(value: object) -> bool:
    if type(value) not in (int, float):
        return False
    try:
        return math.isfinite(float(value))  # type: ignore[arg-type]
    except OverflowError:
        return False
