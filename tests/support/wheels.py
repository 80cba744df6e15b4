"""What is asked of a wheel that others install."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support import processes

MOST_BYTES = 5_000_000
"""Of a wheel without the bundled model."""
# The C library, the compiler's own, and C++'s: a wheel for Linux relies on no other.
OF_THE_SYSTEM = {"libc", "libgcc_s", "libm", "libpthread", "libstdc++", "ld-linux-aarch64"}


def tool(name: str) -> str:
    """The path of a command that comes with the development requirements."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is missing: pip install {name}")
    return found


def assert_small(wheel: Path) -> None:
    """Hold a wheel to 5 MB beside the model, and to one native module without debug symbols."""
    with zipfile.ZipFile(wheel) as archive:
        files = archive.infolist()
    model = sum(file.compress_size for file in files if file.filename.endswith(".safetensors"))
    size = wheel.stat().st_size - model
    assert size < MOST_BYTES, f"{wheel.name} has {size:,} bytes beside the model"
    assert sum(file.filename.endswith(".so") for file in files) == 1


def assert_needs_the_system_only(wheel: Path) -> None:
    """Hold a wheel for Linux to the libraries that every Linux has, by auditwheel."""
    done = processes.run(tool("auditwheel"), "show", wheel)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert re.search(r'platform tag: "manylinux_2_\d+_\w+"', said), said
    libraries = set(re.findall(r"([\w+-]+)\.so\.\d+ with versions", said))
    assert libraries, said
    assert libraries <= OF_THE_SYSTEM, said


def assert_hides_its_functions(wheel: Path, folder: Path) -> None:
    """Hold the native module to hide its functions, so that no other library's can stand in."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".so"))
        module = archive.extract(name, folder)
    done = processes.run("nm", "--dynamic", "--defined-only", module, check=True)
    names = [line.split()[-1] for line in done.stdout.splitlines()]
    assert "PyInit__core" in names
    assert [name for name in names if "anymamba" in name] == []


def pip_wheel(
    python: Path | str, source: Path, folder: Path, *settings: str, **options: object
) -> subprocess.CompletedProcess[str]:
    """Build a wheel with what this environment has: nothing is downloaded."""
    command = [python, "-m", "pip", "wheel", source, "--no-deps", "--no-build-isolation"]
    command += ["--wheel-dir", folder]
    for setting in settings:
        command += ["--config-settings", setting]
    return processes.run(*command, **options)


def compiler_cache() -> dict[str, str]:
    """Environment variables that let ccache, where it is, compile only what changed."""
    if shutil.which("ccache") is None:
        return {}
    return {"CMAKE_CXX_COMPILER_LAUNCHER": "ccache", "CCACHE_NOHASHDIR": "1"}
