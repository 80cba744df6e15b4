"""The drop-in is switched on and off: imports, metadata, originals that are installed too."""

import doctest
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from anymamba import dropin
from anymamba.dropin import dispatch
from anymamba.errors import AnyMambaError, InputError, MissingModuleError
from anymamba.upstream import NAMES, PACKAGES, import_original, is_original_installed
from tests.support import processes

# Other tests may have imported such models; one test looks for this warning, in a fresh process.
pytestmark = pytest.mark.filterwarnings("ignore:Transformers imported its:RuntimeWarning")
VERSIONS = {"mamba-ssm": "2.3.2.post1", "causal-conv1d": "1.7.0"}
SCAN = "mamba_ssm.ops.selective_scan_interface"


def public_modules() -> dict[str, ModuleType]:
    return {name: sys.modules[name] for name in sys.modules if name.split(".")[0] in NAMES}


@pytest.fixture(autouse=True)
def switched_off_after() -> Iterator[None]:
    yield
    dropin.uninstall()
    for name in public_modules():
        del sys.modules[name]


def test_without_it_nothing_answers() -> None:
    assert not dropin.is_installed()
    for package in PACKAGES:
        assert importlib.util.find_spec(package) is None
    for name in VERSIONS:
        with pytest.raises(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(name)


def test_a_public_name_is_our_module_itself() -> None:
    dropin.install()
    public = importlib.import_module(SCAN)
    assert public is importlib.import_module(f"anymamba.dropin.{SCAN}")
    assert sys.modules["mamba_ssm"].ops.selective_scan_interface is public
    # The import system writes into modules; ours must still know who they are.
    assert public.__name__ == public.__spec__.name == f"anymamba.dropin.{SCAN}"
    import causal_conv1d

    assert causal_conv1d.__name__ == "anymamba.dropin.causal_conv1d"


def test_whoever_looks_for_the_packages_finds_them() -> None:
    dropin.install()
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert Path(spec.origin or "") == Path(dropin.__file__).parent / package / "__init__.py"
    providers = importlib.metadata.packages_distributions()
    for name, version in VERSIONS.items():
        package = name.replace("-", "_")
        for spelling in (name, package, name.title()):
            assert importlib.metadata.version(spelling) == version
        assert importlib.import_module(package).__version__ == version
        assert providers[package] == [package]
        assert package in {found.name for found in importlib.metadata.distributions()}


def test_looking_for_the_packages_imports_no_torch() -> None:
    program = (
        "import anymamba.dropin, importlib.util, importlib.metadata, sys\n"
        "anymamba.dropin.install()\n"
        "assert importlib.util.find_spec('mamba_ssm')\n"
        "importlib.metadata.version('mamba-ssm')\n"
        "assert 'torch' not in sys.modules and 'mamba_ssm' not in sys.modules\n"
    )
    done = processes.python("-c", program)
    assert done.returncode == 0, done.stderr


def test_uninstalling_restores_everything() -> None:
    finders, modules = list(sys.meta_path), public_modules()
    dropin.install()
    importlib.import_module(SCAN)
    importlib.import_module("causal_conv1d")
    dropin.install(force=True)
    dropin.uninstall()
    assert sys.meta_path == finders
    assert public_modules() == modules
    assert not dispatch.answering
    test_without_it_nothing_answers()
    dropin.uninstall()
    with pytest.raises(ModuleNotFoundError, match="No module named 'mamba_ssm'"):
        importlib.import_module("mamba_ssm")


@pytest.mark.parametrize(
    "statement",
    [
        "import mamba_ssm.modules.mamba3",
        "from mamba_ssm.modules.mamba3 import Mamba3",
        "from mamba_ssm import Mamba3",
        "from mamba_ssm.ops.cute import mamba3",
        "import mamba_ssm.ops.tilelang.mamba3",
        "from mamba_ssm.ops.triton import ssd_bmm",
    ],
)
def test_what_is_left_out_is_named(statement: str) -> None:
    dropin.install()
    with pytest.raises(ImportError, match=r"docs/drop-in\.md lists what is") as caught:
        exec(statement)
    words = statement.split()
    left_out = f"{words[1]}.{words[3]}" if words[0] == "from" else words[1]
    assert isinstance(caught.value, MissingModuleError)
    assert isinstance(caught.value, AnyMambaError)
    assert caught.value.name is not None
    assert left_out.startswith(caught.value.name)
    assert str(caught.value).startswith(f"{caught.value.name} is not in AnyMamba's drop-in")


def test_probing_for_a_name_that_is_left_out_finds_nothing() -> None:
    dropin.install()
    assert not hasattr(importlib.import_module("mamba_ssm"), "Mamba3")


@pytest.fixture
def original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An original package of three modules, on the path."""
    files = {
        "__init__.py": "from mamba_ssm.ops.selective_scan_interface import selective_scan_fn\n",
        "ops/__init__.py": "",
        "ops/selective_scan_interface.py": (
            "from mamba_ssm.ops.kernels import NAME\n"
            "def selective_scan_fn(u, *args, **kwargs): return NAME\n"
        ),
        "ops/kernels.py": "NAME = 'the original'\n",
    }
    for name, text in files.items():
        file = tmp_path / "mamba_ssm" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "mamba_ssm"


def test_an_original_is_loaded_apart(original: Path) -> None:
    dropin.install()
    ours = importlib.import_module(SCAN)
    assert ours.__name__.startswith("anymamba.")
    assert is_original_installed("mamba_ssm")
    assert not is_original_installed("causal_conv1d")
    theirs = import_original(SCAN)
    assert Path(theirs.__file__ or "").parent == original / "ops"
    assert theirs.selective_scan_fn(None) == "the original"
    assert import_original(SCAN) is theirs
    assert sys.modules[SCAN] is importlib.import_module(SCAN) is ours
    assert sys.modules["mamba_ssm"].__name__ == "anymamba.dropin.mamba_ssm"
    assert dispatch.answering == {"mamba_ssm"}
    dropin.install(force=True)
    assert not dispatch.answering


def test_after_uninstalling_the_original_is_back(original: Path) -> None:
    dropin.install()
    importlib.import_module(SCAN)
    theirs = import_original(SCAN)
    dropin.uninstall()
    assert importlib.import_module(SCAN) is theirs
    dropin.install()
    assert import_original(SCAN) is theirs
    assert importlib.import_module(SCAN) is not theirs


def test_an_original_imported_before_is_put_back(original: Path) -> None:
    importlib.import_module(SCAN)
    before = public_modules()
    dropin.install()
    assert importlib.import_module(SCAN) is not before[SCAN]
    assert import_original(SCAN) is before[SCAN]
    dropin.uninstall()
    assert public_modules() == before


def test_a_package_of_the_programs_own_is_left_alone(original: Path) -> None:
    """Its extensions are answered, and the other package."""
    (original / "fork.py").write_text("import selective_scan_cuda, causal_conv1d")
    dropin.install(own=["mamba_ssm"])
    fork = importlib.import_module("mamba_ssm.fork")
    assert Path(fork.__file__ or "").parent == original
    assert importlib.import_module(SCAN).selective_scan_fn(None) == "the original"
    assert fork.selective_scan_cuda.__name__ == "anymamba.dropin.selective_scan_cuda"
    assert fork.causal_conv1d.__name__ == "anymamba.dropin.causal_conv1d"
    assert not dispatch.answering
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("mamba-ssm")
    assert importlib.metadata.version("causal-conv1d") == VERSIONS["causal-conv1d"]
    dropin.install()
    assert importlib.import_module("mamba_ssm").__name__ == "anymamba.dropin.mamba_ssm"
    dropin.uninstall()
    assert importlib.import_module(SCAN).selective_scan_fn(None) == "the original"
    with pytest.raises(InputError, match="own names 'torch'"):
        dropin.install(own=["torch"])


def test_modules_that_only_the_original_has_come_from_it(original: Path) -> None:
    dropin.install()
    kernels = importlib.import_module("mamba_ssm.ops.kernels")
    assert kernels.NAME == "the original"
    assert kernels is import_original("mamba_ssm.ops.kernels")
    assert importlib.import_module("mamba_ssm").__name__.startswith("anymamba.")
    dropin.install(force=True)
    del sys.modules["mamba_ssm.ops.kernels"]
    with pytest.raises(MissingModuleError, match=r"mamba_ssm\.ops\.kernels"):
        importlib.import_module("mamba_ssm.ops.kernels")


def test_a_broken_original_breaks_only_calls_that_need_it(original: Path) -> None:
    (original / "ops" / "kernels.py").write_text("raise ImportError('no CUDA here')")
    dropin.install()
    importlib.import_module(SCAN)
    for _ in range(2):
        with pytest.raises(ImportError, match="no CUDA here"):
            import_original(SCAN)
        assert sys.modules[SCAN].__name__.startswith("anymamba.")
    importlib.import_module("mamba_ssm.ops")


@pytest.mark.slow
def test_transformers_models_imported_before_are_told_of() -> None:
    program = (
        "import sys, warnings, transformers.models.jamba.modeling_jamba\n"
        "import anymamba.dropin\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    anymamba.dropin.install()\n"
        "    anymamba.dropin.install(force=True)\n"
        "(message,) = [str(w.message) for w in caught if w.category is RuntimeWarning]\n"
        "assert '\\n' not in message\n"
        "print(caught[0].filename, message)\n"
    )
    done = processes.python("-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("<string> Transformers imported its jamba before ")
    assert "call install() before that import" in done.stdout


@pytest.mark.slow
def test_without_such_a_model_nothing_is_told() -> None:
    program = "import transformers, anymamba.dropin; anymamba.dropin.install()"
    done = processes.python("-c", program)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_examples_of_the_three_functions_run() -> None:
    failed, tried = doctest.testmod(dropin)
    assert (failed, tried) == (0, 9)
