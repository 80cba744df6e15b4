"""The public names of the drop-in, as docs/drop-in.md lists them.

`python -m tests.dropin.surface` prints the page's tables anew, with the remarks that stand there.
"""

import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from anymamba import dropin
from anymamba.upstream import NAMES

PAGE = Path(__file__).parents[2] / "docs" / "drop-in.md"
ROW = re.compile(r"^\| `([^`]+)` \| (.*) \|$", flags=re.MULTILINE)


def modules() -> dict[str, ModuleType]:
    """The drop-in's modules that have public names, by the names that programs import."""
    prefix = f"{dropin.__name__}."
    found = {}
    for entry in pkgutil.walk_packages(dropin.__path__, prefix):
        name = entry.name.removeprefix(prefix)
        if name.partition(".")[0] in NAMES:
            module = import_module(entry.name)
            if getattr(module, "__all__", None):
                found[name] = module
    return found


def signatures(module: ModuleType) -> list[str]:
    """Each public function, class and method of a module with its arguments and defaults.

    The methods of a class stand where the class is defined alone.
    """
    found = []
    for name in module.__all__:
        value = getattr(module, name)
        if not inspect.isclass(value):
            found.append(name + arguments(value))
        elif "apply" in vars(value):
            # What was an autograd function. Nobody makes instances of it.
            found.append(f"{name}.apply{arguments(value.apply)}")
        else:
            found.append(name + arguments(value))
            if value.__module__ == module.__name__:
                found += methods(name, value)
    return found


def methods(name: str, value: type) -> Iterator[str]:
    """The public methods of a class that are ours."""
    ours = {
        method: function
        for base in reversed(value.__mro__)
        if base.__module__.startswith("anymamba.")
        for method, function in vars(base).items()
        if not method.startswith("_") and callable(getattr(base, method))
    }
    for method, function in ours.items():
        bound = isinstance(function, classmethod | staticmethod)
        yield f"{name}.{method}{arguments(getattr(value, method), 0 if bound else 1)}"


def arguments(function: Callable[..., Any], leave_out: int = 0) -> str:
    """The arguments of a function in parentheses, without annotations or the first few."""
    parameters = list(inspect.signature(function).parameters.values())[leave_out:]
    plain = [
        parameter.replace(annotation=inspect.Parameter.empty, default=shown(parameter.default))
        for parameter in parameters
    ]
    return str(inspect.Signature(plain))


def shown(default: object) -> object:
    """A default value, or something that shows what a program would write for it."""
    home = {"torch.nn.functional": "F."}.get(getattr(default, "__module__", ""), "")
    if inspect.isfunction(default):
        return Shown(home + default.__name__)
    if inspect.isclass(default) and issubclass(default, nn.Module):
        return Shown(f"nn.{default.__name__}")
    return default


@dataclass(frozen=True)
class Shown:
    """Shows as a text."""

    text: str

    def __repr__(self) -> str:
        return self.text


def listed() -> dict[str, list[tuple[str, str]]]:
    """What the page lists: of each module the signatures and the remarks beside them."""
    _, *sections = re.split(r"^### `([\w.]+)`$", PAGE.read_text(encoding="utf-8"), flags=re.M)
    return {
        name: ROW.findall(text) for name, text in zip(sections[::2], sections[1::2], strict=True)
    }


def main() -> None:
    """Print the tables."""
    remarks = {
        (name, row.partition("(")[0]): remark
        for name, rows in listed().items()
        for row, remark in rows
    }
    for name, module in modules().items():
        print(f"### `{name}`\n\n| name and arguments | what differs |\n| --- | --- |")
        for row in signatures(module):
            print(f"| `{row}` | {remarks.get((name, row.partition('(')[0]), '')} |")
        print()


if __name__ == "__main__":
    main()
