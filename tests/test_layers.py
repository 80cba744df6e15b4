"""Who may import whom, as CONTRIBUTING.md says, and what an import brings in."""

import ast
from collections import Counter
from collections.abc import Collection, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import anymamba
from tests.support import processes

PACKAGE = Path(anymamba.__file__).parent
ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers")
# What a room of the package must not know of, neither at import time nor later.
STRANGERS = {
    "checkpoint": ("ops", "layers", "modeling", "runtime", "dropin", "cli", "training", "server"),
    "ops": ("layers", "modeling", "runtime", "checkpoint", "dropin", "cli", "training", "server"),
    "layers": ("modeling", "runtime", "checkpoint", "dropin", "cli", "training", "server"),
    "modeling": ("runtime", "dropin", "cli", "training", "server"),
    "runtime": ("modeling", "ops", "layers", "dropin", "cli", "training", "server"),
    "dropin": ("modeling", "runtime", "cli", "training", "server"),
    "training": ("cli", "server"),
    "server": ("modeling", "ops", "layers", "dropin", "cli", "training"),
}
LIGHT = (
    "checkpoint",
    "runtime",
    "cli",
    "assets",
    "__init__.py",
    "__main__.py",
    "arithmetic.py",
    "errors.py",
    "upstream.py",
    "processors.py",
    "dropin/__init__.py",
    "dropin/dispatch.py",
    "dropin/finder.py",
    "dropin/metadata.py",
    "training/__init__.py",
    "training/finetune/__init__.py",
    "training/finetune/settings.py",
    "training/settings.py",
)


def modules(room: str) -> list[Path]:
    place = PACKAGE / room
    return [place] if place.is_file() else sorted(place.rglob("*.py"))


def imports(file: Path, only_at_import_time: bool = False) -> Iterator[str]:
    """The absolute names that a file imports; not those for type checkers alone."""
    pending: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if only_at_import_time and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        pending.extend(ast.iter_child_nodes(node))


@pytest.mark.parametrize("room", STRANGERS)
def test_rooms_know_only_their_neighbours(room: str) -> None:
    for file in modules(room):
        for name in imports(file):
            for stranger in STRANGERS[room]:
                place = f"anymamba.{stranger}"
                assert name != place, file
                assert not name.startswith(place + "."), file


def test_the_drop_in_calls_its_modules_by_our_name() -> None:
    for file in modules("dropin"):
        for name in imports(file):
            assert name.split(".")[0] not in ("mamba_ssm", "causal_conv1d"), file


def test_nothing_imports_the_command_line() -> None:
    for file in modules("."):
        if "cli" not in file.parts and file.name != "__main__.py":
            assert not any(name.startswith("anymamba.cli") for name in imports(file)), file


def module_name(file: Path) -> str:
    name = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
    return name.removesuffix(".__init__")


def runs_first(file: Path, known: Collection[str]) -> set[str]:
    """The modules that Python runs before this one: what it imports, and the folders of that.

    Its own folders began to run before it, and do not count.
    """
    name = module_name(file)
    around = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for imported in imports(file, only_at_import_time=True):
        parts = imported.split(".")
        for count in range(1, len(parts) + 1):
            one = ".".join(parts[:count])
            if one in known and not f"{around}.".startswith(f"{one}."):
                found.add(one)
    return found - {name}


def test_no_imports_run_in_a_circle() -> None:
    files = {module_name(file): file for file in modules(".")}
    # Raises CycleError, which names the circle.
    TopologicalSorter({name: runs_first(file, files) for name, file in files.items()}).prepare()


def test_folders_and_files_stay_small() -> None:
    folders = Counter(file.parent for file in modules("."))
    assert {str(folder): count for folder, count in folders.items() if count > 16} == {}
    core = [*(ROOT / "core").rglob("*.cpp"), *(ROOT / "core").rglob("*.h")]
    for files, most in (modules("."), 450), (core, 600):
        lines = {str(file): len(file.read_text().splitlines()) for file in files}
        assert {name: count for name, count in lines.items() if count > most} == {}


@pytest.mark.parametrize("room", LIGHT)
def test_light_rooms_import_no_torch(room: str) -> None:
    for file in modules(room):
        for name in imports(file, only_at_import_time=True):
            assert name.split(".")[0] not in HEAVY, file


@pytest.mark.parametrize(
    "module",
    ["anymamba.cli.main", "anymamba.cli.commands.run", "anymamba.checkpoint", "anymamba.dropin"],
)
def test_an_import_brings_in_nothing_heavy(module: str) -> None:
    assert not {"torch", "transformers", "numpy"} & processes.imported_by(f"import {module}")


def test_public_names_load_on_first_use() -> None:
    for name in anymamba.__all__:
        assert getattr(anymamba, name) is not None
    assert set(anymamba.__all__) <= set(dir(anymamba))
    with pytest.raises(AttributeError, match="no attribute 'Hydra'"):
        anymamba.Hydra  # noqa: B018


def test_without_torch_a_name_says_what_to_install() -> None:
    script = (
        "import sys; sys.modules['torch'] = None; import anymamba\n"
        "try: anymamba.MambaModel\n"
        "except anymamba.errors.MissingDependencyError as error: print(error)"
    )
    result = processes.python("-c", f"import anymamba.errors; {script}", check=True)
    assert "pip install 'anymamba[torch]'" in result.stdout
