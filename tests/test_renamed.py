"""Every public name of release 0.1 still imports, and one that has another name now warns."""

import sys
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

import anymamba
from anymamba.renamed import MODULES, NAMES
from anymamba.runtime.generation import GenerationOutput, TokenOutput
from anymamba.upstream import PACKAGES
from tests.support import processes

# One module a line, and what its __all__ held.
LINES = Path(__file__).with_name("names_of_0_1.txt").read_text(encoding="utf-8").splitlines()


def imported(module: str) -> ModuleType:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES:
            raise
        pytest.skip(f"{module} adapts {error.name}, which is not installed")


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.partition(":")[0])
def test_every_name_imports(line: str) -> None:
    module, _, names = line.partition(":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = imported(module)
        for name in names.split():
            assert getattr(found, name) is not None


@pytest.mark.parametrize("old", MODULES)
def test_an_old_module_is_the_new_one_and_warns(old: str) -> None:
    new = imported(f"anymamba.{MODULES[old]}")
    spec = new.__spec__
    sys.modules.pop(f"anymamba.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"anymamba.{old} is now anymamba.{MODULES[old]}"):
        assert import_module(f"anymamba.{old}") is new
    assert new.__spec__ is spec


@pytest.mark.parametrize("module", NAMES)
def test_an_old_name_warns(module: str) -> None:
    found = import_module(f"anymamba.{module}")
    for name in NAMES[module]:
        with pytest.warns(DeprecationWarning, match=f"anymamba.{module}.{name} is now anymamba."):
            getattr(found, name)
    with pytest.raises(AttributeError, match="no attribute 'Hydra'"):
        found.Hydra  # noqa: B018


def test_old_names_of_methods_and_attributes_warn() -> None:
    engine = anymamba.load()
    with pytest.warns(DeprecationWarning, match="Engine.feed is now Engine.prefill"):
        state = engine.feed(engine.state(), "ROMEO:")
    assert state.token_count == 6
    with pytest.warns(DeprecationWarning, match="Engine.weights_kind is now Engine.weight_type"):
        assert engine.weights_kind == engine.weight_type == "bf16"
    for reason, before in ("eos", "end"), ("stop", "stop"), ("length", "length"):
        output = TokenOutput("", (1,), finish_reason=reason)  # type: ignore[arg-type]
        whole = GenerationOutput("", [1], reason, [])  # type: ignore[arg-type]
        with pytest.warns(DeprecationWarning, match="'eos' was 'end'"):
            assert output.stopped_by == whole.stopped_by == before


def test_the_warning_points_at_the_program_that_asks(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import anymamba\n\nfrom anymamba.runtime.mapping import FileMap\n")
    done = processes.python(program, check=True)
    assert f"{program}:3: DeprecationWarning: anymamba.runtime.mapping is now" in done.stderr


def test_what_never_was_is_not_found() -> None:
    assert find_spec("anymamba.hydra") is None
