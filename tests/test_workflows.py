"""The workflows are valid, ask for little, and build wheels for every system that is promised."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import processes, wheels

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
WITHOUT_TORCH = ROOT / "tests" / "without_torch.txt"

SYSTEMS = {
    ("linux", "x86_64"): ["manylinux_x86_64", "musllinux_x86_64"],
    ("linux", "aarch64"): ["manylinux_aarch64", "musllinux_aarch64"],
    ("macos", "x86_64"): ["macosx_x86_64"],
    ("macos", "arm64"): ["macosx_arm64"],
    ("windows", "AMD64"): ["win_amd64"],
    ("windows", "ARM64"): ["win_arm64"],
}


def run_tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return processes.run(wheels.tool(name), *arguments, cwd=ROOT)


def jobs(workflow: str) -> dict[str, Any]:
    text = (ROOT / ".github" / "workflows" / workflow).read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)["jobs"]
    return found


def test_workflows_are_what_their_schema_says() -> None:
    assert [path.name for path in WORKFLOWS] == ["tests.yml", "wheels.yml"]
    options = ("--builtin-schema", "vendor.github-workflows")
    done = run_tool("check-jsonschema", *options, *WORKFLOWS)
    assert done.returncode == 0, done.stdout


def test_workflows_pin_their_actions_and_ask_for_little() -> None:
    done = run_tool("zizmor", "--offline", "--no-progress", *WORKFLOWS)
    assert done.returncode == 0, done.stdout
    for path in WORKFLOWS:
        for action in re.findall(r"uses: (.+)", path.read_text(encoding="utf-8")):
            assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v[\d.]+", action), action


def test_publishing_alone_may_speak_for_the_project() -> None:
    allowed = {name: job["permissions"] for name, job in jobs("wheels.yml").items()}
    assert allowed.pop("publish") == {"id-token": "write"}
    allowed |= {name: job["permissions"] for name, job in jobs("tests.yml").items()}
    assert set(map(str, allowed.values())) == {"{'contents': 'read'}"}
    assert "refs/tags/" in jobs("wheels.yml")["publish"]["if"]


@pytest.mark.parametrize(("system", "processor"), SYSTEMS)
def test_wheels_are_built_for(system: str, processor: str) -> None:
    options = ("--print-build-identifiers", "--platform", system, "--archs", processor)
    done = run_tool("cibuildwheel", *options)
    assert done.returncode == 0, done.stderr
    expected = {
        f"{python}-{platform}"
        for platform in SYSTEMS[system, processor]
        for python in ("cp311", "cp312", "cp314")
    }
    assert set(done.stdout.split()) == expected


def test_make_has_what_the_workflows_run() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    named = {
        target
        for path in WORKFLOWS
        for target in re.findall(r"\bmake ([a-z-]+)$", path.read_text(encoding="utf-8"), re.M)
    }
    assert named
    assert named <= targets


HIDDEN = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(f"{name} is hidden", name=name)

sys.meta_path.insert(0, Hidden())
import pytest
sys.exit(pytest.main(["--collect-only", "--quiet", f"@{sys.argv[1]}"]))
"""


def test_the_tests_of_a_wheel_need_no_torch() -> None:
    done = processes.python("-c", HIDDEN, WITHOUT_TORCH, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]
    assert sum(map(int, re.findall(r"^tests/.*: (\d+)$", done.stdout, re.M))) > 100
