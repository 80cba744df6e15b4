"""The wheel for 64-bit Arm: cross-compiled, then used by an emulated Python."""

import re
from pathlib import Path

import pytest
from filelock import FileLock

import anymamba
from tests.support import wheels
from tests.systems.arm_python import ROOT, ArmPython, missing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.systems,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

# Operators on every instruction set of the emulated processor, and the runtime. Two tests of
# bfloat16 take half of the time and tell no more here.
SELECTION = [
    "tests/native/test_functions.py",
    "tests/native/test_quantized.py",
    "tests/runtime/test_engine.py",
    "tests/runtime/weights/test_quantized_engine.py",
    "tests/runtime/weights/test_storage_types.py",
    "-k",
    "not rows_of_bfloat16",
]


@pytest.fixture(scope="module")
def arm() -> ArmPython:
    return ArmPython(ROOT / "build" / "arm-python")


@pytest.fixture(scope="module")
def wheel(arm: ArmPython) -> Path:
    # Two processes of pytest may come here at once.
    arm.root.parent.parent.mkdir(exist_ok=True)
    with FileLock(f"{arm.root.parent}.lock"):
        return arm.install()


def test_an_arm_wheel_is_cross_built_and_passes_its_tests(
    arm: ArmPython, wheel: Path, tmp_path: Path
) -> None:
    wheels.assert_small(wheel)
    wheels.assert_needs_the_system_only(wheel)
    wheels.assert_hides_its_functions(wheel, tmp_path)

    done = arm.run("-c", "from anymamba import _core; print(*_core.isas())")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "neon"

    done = arm.run(
        "-m", "anymamba", "generate", "ROMEO:", "-n", "12", "--temperature", "0", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    greedy = anymamba.load().generate("ROMEO:", max_new_tokens=12, do_sample=False)
    assert done.stdout.strip() == greedy.text.strip()

    done = arm.run("-m", "pytest", *SELECTION, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 100
