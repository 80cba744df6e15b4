"""One wheel for Python 3.12 and all later versions: built by one of them and used by another."""

import os
import re
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support import processes, wheels

pytestmark = [pytest.mark.slow, pytest.mark.systems]

ROOT = Path(__file__).parents[2]
NEWER = re.compile(r"python3\.1[2-9]")


def _newer_pythons() -> Iterator[tuple[int, Path]]:
    """The interpreters of 3.12 and later on this machine, by their minor version."""
    folders = [Path(folder) for folder in os.environ["PATH"].split(os.pathsep)]
    folders += (Path.home() / ".pyenv" / "versions").glob("*/bin")
    for folder in folders:
        for python in folder.glob("python3.1?"):
            # pyenv has a file of this name for each version, which may refuse.
            if NEWER.fullmatch(python.name) and processes.run(python, "-V").returncode == 0:
                yield int(python.name.removeprefix("python3.")), python


def _home_of(package: str) -> str:
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parents[1])


PYTHONS = dict(sorted(_newer_pythons()))

# numpy of this environment is for one version of Python only: memoryviews have shapes too.
USE = """
import sys
import anymamba._core as core

numbers = memoryview(bytearray(12)).cast("f", (3,))
result = memoryview(bytearray(12)).cast("f", (3,))
numbers[1] = 1.0
for isa in core.isas():
    core.use_isa(isa)
    core.apply("exp", numbers, result)
    assert [round(x, 5) for x in result.tolist()] == [1.0, 2.71828, 1.0], result.tolist()
print(core.__file__)
"""


@pytest.mark.skipif(not PYTHONS, reason="no Python 3.12 or newer: pyenv install 3.13")
def test_a_wheel_of_the_stable_abi_serves_later_versions(tmp_path: Path) -> None:
    builder = PYTHONS[min(PYTHONS)]
    done = wheels.pip_wheel(
        builder,
        ROOT,
        tmp_path,
        f"build-dir={tmp_path / 'build'}",
        "cmake.define.ANYMAMBA_ISAS=portable",
        # What builds is of this environment, and is written in Python.
        env={
            **os.environ,
            **wheels.compiler_cache(),
            "ANYMAMBA_REQUIRE_NATIVE": "1",
            "PYTHONPATH": os.pathsep.join({_home_of("nanobind"), _home_of("scikit_build_core")}),
        },
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"anymamba-[\d.]+-cp312-abi3-linux_\w+\.whl", wheel.name)
    wheels.assert_small(wheel)
    wheels.assert_needs_the_system_only(wheel)
    wheels.assert_hides_its_functions(wheel, tmp_path / "unpacked")
    done = processes.run(wheels.tool("abi3audit"), "--strict", "--summary", wheel)
    assert done.returncode == 0, done.stdout + done.stderr

    shutil.unpack_archive(wheel, tmp_path / "installed", "zip")
    for python in PYTHONS.values():
        done = processes.run(
            python, "-c", USE, env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip().endswith("_core.abi3.so")
