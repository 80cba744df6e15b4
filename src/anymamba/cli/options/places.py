"""The options of commands that read one model and write another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anymamba.cli.options.fields import flag, offline_flag, option
from anymamba.errors import InputError


@dataclass(frozen=True)
class Places:
    """What is read and what is written, by place or by name."""

    places: Sequence[str] = option(
        nargs="*",
        metavar="SRC DST",
        help="SRC is a folder, a GGUF file, or a name on the hub; DST is a new folder",
    )
    source: str | None = option("--model", "-m", metavar="FOLDER", help="SRC by name")
    destination: str | None = option("--output", "-o", metavar="FOLDER", help="DST by name")
    overwrite: bool = flag("--overwrite", "replace what is there")
    offline: bool = offline_flag()
    json: bool = flag("--json", "print one JSON object")


def places_of(options: Places) -> tuple[str, str]:
    """The source and the destination."""
    places = list(options.places)
    # A command's module has its name.
    see = f"(see anymamba {type(options).__module__.rpartition('.')[2]} --help)"
    found = []
    for name, field in (("SRC", "source"), ("DST", "destination")):
        named = getattr(options, field)
        if named is None and not places:
            long_name = type(options).__dataclass_fields__[field].metadata["names"][0]
            raise InputError(f"{name} is missing: give it, or {long_name} {name} {see}")
        found.append(places.pop(0) if named is None else named)
    if places:
        raise InputError(
            f"{places[0]!r} is one argument too many: give SRC and DST once each {see}"
        )
    return found[0], found[1]
