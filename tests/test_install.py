"""Installing: from a source archive with a compiler, and without one."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest

from anymamba import _core
from tests.support import processes, wheels

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SITE_PACKAGES = str(Path(np.__file__).parents[1])
# Nothing is downloaded: what the build needs is in this environment.
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
# Compiling for every other one would tell no more, and takes a minute.
ISAS = list(dict.fromkeys([_core.isas()[0], "portable"]))
NO_COMPILER = OFFLINE | {"CXX": "/nonexistent/c++", "CC": "/nonexistent/cc"}


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {n: v for n, v in os.environ.items() if n not in ("CXX", "CC", "PYTHONPATH")}
    inherited.pop("ANYMAMBA_REQUIRE_NATIVE", None)
    return processes.run(
        *command,
        env=inherited | environment,
        cwd=ROOT.anchor,
        capture_output=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def output(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stdout[-5000:]
    return result.stdout


def pip_wheel(source: Path, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A wheel of the sources, built beside them: what lies in this checkout's build is not used."""
    options = ["--no-deps", "--no-build-isolation", "--verbose"]
    options += ["--wheel-dir", str(folder), "--config-settings", f"build-dir={folder}/build"]
    options += ["--config-settings", f"cmake.define.ANYMAMBA_ISAS={';'.join(ISAS)}"]
    return run(sys.executable, "-m", "pip", "wheel", source, *options, **environment)


def the_wheel(folder: Path) -> Path:
    (found,) = folder.glob("*.whl")
    return found


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def unpacked(wheel: Path, folder: Path) -> Path:
    """A wheel is installed by unpacking it."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def source_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    script = f"from scikit_build_core.build import build_sdist; build_sdist({str(folder)!r})"
    done = processes.python("-c", script, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-5000:]
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel_without_core(source_archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("without")
    text = output(pip_wheel(source_archive, folder, **NO_COMPILER))
    assert "WITHOUT its native core" in text
    return the_wheel(folder)


def test_the_source_archive_holds_the_core_and_no_leftovers(source_archive: Path) -> None:
    with tarfile.open(source_archive) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    core = {str(path.relative_to(ROOT)) for path in (ROOT / "core").rglob("*.*")}
    assert core <= names
    assert {"CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"} <= names
    # Sources only: no builds, no environments.
    assert not any(name.endswith((".so", ".o", ".pyc", ".whl")) for name in names)
    assert not any(name.startswith((".venv", "build/", ".git/", "shared")) for name in names)


# Without numpy too, whose arrays are not the only ones: memoryviews have shapes as well.
IN_AN_EMPTY_ENVIRONMENT = """
import sys
import anymamba, anymamba._core as core

assert "numpy" not in sys.modules
def floats(*shape):
    count = 1
    for size in shape: count *= size
    return memoryview(bytearray(4 * count)).cast("f", shape)

x, y, weight = floats(1, 3, 2), floats(1, 3, 2), floats(2, 2)
x[0, 1, 0] = weight[0, 1] = 2.0
weight[0, 0] = 3.0
for isa in core.isas():
    core.use_isa(isa)
    core.conv(x, weight, None, False, None, None, 1, False, y, None)
    assert y.tolist() == [[[0.0, 0.0], [4.0, 0.0], [6.0, 0.0]]], y.tolist()
print(*core.isas())
"""
ON_NUMPY_ARRAYS = """
import numpy
import anymamba._core as core

x = numpy.linspace(-5, 5, 37, dtype="f4")
y = numpy.empty_like(x)
core.apply("exp", x, y)
assert numpy.allclose(y, numpy.exp(x), rtol=1e-6)
print(core.isa())
"""


def test_a_wheel_is_built_and_used_in_an_empty_environment(
    source_archive: Path, tmp_path: Path
) -> None:
    output(pip_wheel(source_archive, tmp_path, ANYMAMBA_REQUIRE_NATIVE="1", **OFFLINE))
    wheel = the_wheel(tmp_path)
    assert not wheel.name.endswith("-none-any.whl")
    wheels.assert_small(wheel)
    wheels.assert_needs_the_system_only(wheel)
    wheels.assert_hides_its_functions(wheel, tmp_path / "unpacked")
    names = names_in(wheel)
    assert sum(name.startswith("anymamba/_core.") for name in names) == 1
    package = ROOT / "src" / "anymamba"
    files = [*package.rglob("*.py"), *(package / "server" / "page").iterdir()]
    assert {str(path.relative_to(ROOT / "src")) for path in files} <= names
    assert not any(name.startswith(("core/", "tests/", "src/")) for name in names)

    empty = tmp_path / "empty"
    venv.create(empty, with_pip=False)
    python = empty / "bin" / "python"
    options = ["--python", python, "install", "--no-deps", wheel]
    output(run(sys.executable, "-m", "pip", *options, **OFFLINE))
    found = output(run(python, "-c", IN_AN_EMPTY_ENVIRONMENT)).split()
    assert found == ISAS
    # numpy alone, by a link: this environment's other packages stay out.
    (tmp_path / "lib").mkdir()
    for package in Path(SITE_PACKAGES).glob("numpy*"):
        (tmp_path / "lib" / package.name).symlink_to(package)
    found = output(run(python, "-c", ON_NUMPY_ARRAYS, PYTHONPATH=str(tmp_path / "lib"))).split()
    assert found == [_core.isas()[0]]
    missing = run(python, "-c", "import anymamba; anymamba.MambaModel")
    assert missing.returncode == 1
    assert "pip install 'anymamba[torch]'" in missing.stdout


def test_where_the_core_is_required_no_compiler_is_an_error(
    source_archive: Path, tmp_path: Path
) -> None:
    result = pip_wheel(source_archive, tmp_path, ANYMAMBA_REQUIRE_NATIVE="1", **NO_COMPILER)
    assert result.returncode != 0
    assert "/nonexistent/c++" in result.stdout
    assert not list(tmp_path.glob("*.whl"))


WITHOUT_CORE = """
import warnings
import torch
from anymamba import MambaConfig, MambaForCausalLM, ops
from anymamba.errors import BackendError

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        ops.rms_norm(torch.randn(2, 4), torch.ones(4))
        ops.causal_conv1d(torch.randn(1, 5, 4), torch.randn(4, 3))
    model = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2))
    model(torch.ones(2, 7, dtype=torch.long), labels=torch.ones(2, 7, dtype=torch.long))
    model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=4)
    ours = [w for w in caught if issubclass(w.category, RuntimeWarning)]
    print(len(ours), *(w.message for w in ours))
try:
    ops.backend("cpu")
except BackendError as error:
    print(error)
print(ops.available_backends())
"""


def test_without_a_core_pytorch_code_runs_and_says_so_once(
    wheel_without_core: Path, tmp_path: Path
) -> None:
    assert not any("_core" in name for name in names_in(wheel_without_core))
    installed = unpacked(wheel_without_core, tmp_path)
    # -S: this environment's packages, without the links to this checkout among them.
    search_path = f"{installed}{os.pathsep}{SITE_PACKAGES}"
    text = output(run(sys.executable, "-S", "-c", WITHOUT_CORE, PYTHONPATH=search_path))
    warning, refusal, backends = text.splitlines()[-3:]
    assert warning.startswith("1 AnyMamba runs on PyTorch code, many times slower")
    for line in (warning, refusal, backends):
        assert "anymamba._core not installed: install a C++ compiler" in line
