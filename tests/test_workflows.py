"""The workflows are valid, ask for little, and build wheels for every system that is promised."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import processes, wheels
from tests.systems import arm_python, test_browser, test_cross_builds

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


def parsed(workflow: str) -> dict[Any, Any]:
    text = (ROOT / ".github" / "workflows" / workflow).read_text(encoding="utf-8")
    found: dict[Any, Any] = yaml.safe_load(text)
    return found


def jobs(workflow: str) -> dict[str, Any]:
    found: dict[str, Any] = parsed(workflow)["jobs"]
    return found


def installed_by(text: str) -> list[set[str]]:
    """The packages of each `apt-get install` in a text."""
    commands = re.findall(r"^apt-get install (.+)", text.replace("\\\n", " "), re.MULTILINE)
    return [{word for word in line.split() if word[0] != "-"} for line in commands]


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


def test_contributing_names_the_tools_that_the_systems_job_installs() -> None:
    (named,) = installed_by((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    steps = {step.get("name"): step.get("run") for step in jobs("tests.yml")["systems"]["steps"]}
    assert installed_by(steps["The tools, as CONTRIBUTING.md names them"]) == [named]
    # And those that tests name where they skip.
    remedies = "\n".join(arm_python.TOOLS.values())
    skipped_for = {*test_cross_builds.PACKAGES.values(), *test_browser.TOOLS.values()}
    assert named >= skipped_for.union(*installed_by(remedies)) - {"dpkg"}


def test_the_wheel_of_the_stable_abi_is_tested_by_two_pythons() -> None:
    (setup,) = (
        step["with"]["python-version"].split()
        for step in jobs("tests.yml")["linux"]["steps"]
        if "setup-python" in step.get("uses", "")
    )
    assert setup[-1] == "3.11"  # which makes .venv
    assert sum(int(version.removeprefix("3.")) >= 12 for version in setup) >= 2


def test_pull_requests_that_wheels_are_built_for_touch_what_exists() -> None:
    events = parsed("wheels.yml")[True]  # "on", which YAML reads as a truth value
    paths = events["pull_request"]["paths"]
    assert {"core/**", "tests/without_torch.txt"} <= set(paths)
    for path in paths:
        assert any(ROOT.glob(path)), path


def test_every_windows_build_names_its_compiler_and_processor() -> None:
    job = jobs("tests.yml")["others"]
    options = {row["os"]: row["options"] for row in job["strategy"]["matrix"]["include"]}
    assert options.pop("windows-2025") == "-T ClangCL -A x64"
    assert options.pop("windows-11-arm") == "-T ClangCL -A ARM64"
    assert set(options.values()) == {""}
    (step,) = (step for step in job["steps"] if "cmake -S" in step.get("run", ""))
    assert step["env"]["OPTIONS"] == "${{ matrix.options }}"
    assert "cmake -S . -B build/tests $OPTIONS " in step["run"]


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
