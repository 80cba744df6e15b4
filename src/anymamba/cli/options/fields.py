"""A command's options as the fields of a frozen dataclass, from which its parser is made.

    @dataclass(frozen=True)
    class Options:
        file: str = option(metavar="FILE", help="UTF-8 text")
        limit: int | None = integer_option("--limit", help="the first N lines only")

`add_options` declares them, and `read_options` makes an `Options` of what argparse found.
"""

from __future__ import annotations

import argparse
from dataclasses import Field, field, fields
from typing import Any

from anymamba.cli.options.argument_types import integer

# Names of settings, and what their options are called, too: `train` and `finetune` take each
# other's names.
OTHER_NAMES = {
    **dict.fromkeys(("steps", "max_steps"), ("--steps", "--max-steps")),
    **dict.fromkeys(("batch", "batch_size"), ("--batch", "--batch-size")),
    **dict.fromkeys(("accumulation", "accumulate"), ("--accumulation", "--accumulate")),
    **dict.fromkeys(("window", "max_length"), ("--window", "--max-length")),
    "validation_data": ("--validation-data", "--validation"),
    "model": ("--model", "-m"),
    "output": ("--output", "-o"),
}


def option(*names: str, group: tuple[str, ...] = (), **arguments: Any) -> Any:
    """A field that is an option, or without names an argument that stands for itself.

    Args:
        *names: as they are typed, such as `--model`.
        group: the title and the description under which the help lists it.
        **arguments: those of argparse's `add_argument`.
    """
    return field(metadata={"names": names, "group": group, "arguments": arguments})


def integer_option(*names: str, low: int = 1, high: int = 2**63 - 1, **arguments: Any) -> Any:
    """A field for a whole number in a range."""
    return option(*names, **{"type": integer(low, high), "metavar": "N", **arguments})


def flag(name: str, text: str, **facts: Any) -> Any:
    """A field that is True where its option is given."""
    return option(name, action="store_true", help=text, **facts)


def offline_flag(**facts: Any) -> Any:
    """A field for `--offline`."""
    return flag("--offline", "use what was downloaded before, and no network", **facts)


def settings(declared: type) -> Any:
    """A field with those settings that are given, by their names.

    Args:
        declared: a dataclass whose fields are made by `anymamba.training.settings.setting`.
    """
    return field(metadata={"settings": declared, "group": ("settings",)})


def add_options(parser: argparse.ArgumentParser, options: type) -> None:
    """Declare the fields of a dataclass; those in groups come last in the help."""
    groups: dict[tuple[str, ...], argparse._ActionsContainer] = {(): parser}
    for entry in sorted(fields(options), key=lambda entry: bool(entry.metadata["group"])):
        facts = entry.metadata
        if facts["group"] not in groups:
            groups[facts["group"]] = parser.add_argument_group(*facts["group"])
        group = groups[facts["group"]]
        if "settings" in facts:
            for setting in fields(facts["settings"]):
                add_setting(group, setting)
        elif facts["names"]:
            group.add_argument(*facts["names"], dest=entry.name, **facts["arguments"])
        else:
            group.add_argument(entry.name, **facts["arguments"])


def add_setting(group: argparse._ActionsContainer, entry: Field[Any]) -> None:
    """Declare a setting. Its value is checked with all others, in the words used for a file."""
    names = OTHER_NAMES.get(entry.name, ("--" + entry.name.replace("_", "-"),))
    text, facts = str(entry.metadata["help"]).replace("%", "%%"), entry.metadata
    arguments: dict[str, Any] = {"dest": entry.name, "default": None}
    if "many" in facts:
        arguments |= {"nargs": "+", "metavar": facts["many"]}
    elif str(entry.type) == "bool":
        arguments |= {"action": argparse.BooleanOptionalAction}
    elif "choices" in facts:
        arguments |= {"choices": facts["choices"]}
    else:
        text += "" if entry.default is None else f"; default {entry.default}"
        arguments |= {"metavar": facts.get("value", "VALUE")}
    group.add_argument(*names, help=text, **arguments)


def read_options(options: type, found: argparse.Namespace) -> Any:
    """The dataclass, made of what argparse found."""
    values = {}
    for entry in fields(options):
        if "settings" in entry.metadata:
            names = [setting.name for setting in fields(entry.metadata["settings"])]
            given = {name: getattr(found, name) for name in names}
            values[entry.name] = {n: value for n, value in given.items() if value is not None}
        else:
            values[entry.name] = getattr(found, entry.name)
    return options(**values)
