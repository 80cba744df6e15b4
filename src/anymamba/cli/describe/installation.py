"""Which build of AnyMamba this is: its wheel, and what the native core was compiled with."""

from __future__ import annotations

import json
from importlib.metadata import Distribution, PackageNotFoundError
from typing import Any


def wheel() -> dict[str, Any] | None:
    """The wheel that was installed; None where AnyMamba runs from a folder of its sources.

    Returns:
        Its "tags" (Python, binary interface, platform), and where it was "built_from" if that was
        not a package index: the address of the sources; "editable" if it still uses them.
    """
    try:
        installed = Distribution.from_name("anymamba")
    except PackageNotFoundError:
        return None
    lines = (installed.read_text("WHEEL") or "").splitlines()
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    return {
        "tags": [line.removeprefix("Tag: ") for line in lines if line.startswith("Tag: ")],
        "built_from": origin.get("url"),
        "editable": origin.get("dir_info", {}).get("editable", False),
    }


def wheel_line(facts: dict[str, Any] | None) -> str:
    """The same for people."""
    if facts is None:
        return "none: this runs from a folder of its sources"
    tags = ", ".join(facts["tags"]) or "without tags"
    if facts["built_from"] is None:
        return tags
    editable = "editable, " if facts["editable"] else ""
    return f"{tags} ({editable}from {facts['built_from']})"
