"""The core and its C++ tests on other systems and processors: compiled, and run if an emulator is.

A missing tool skips a test and is named, with the line that installs it. Each target has a build
folder that the next run uses again.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILDS = ROOT / "build" / "systems"
COMMON = (
    "-DANYMAMBA_TESTS=ON",
    "-DCMAKE_BUILD_TYPE=Release",
    "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON",
)

WINE = "/usr/lib/wine/wine64"  # where Debian has it
QEMU_ARM = ("qemu-aarch64", "-cpu", "max", "-L", "/usr/aarch64-linux-gnu")
QEMU_RISCV = ("qemu-riscv64", "-L", "/usr/riscv64-linux-gnu")

PACKAGES = {
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "qemu-aarch64": "qemu-user",
    "qemu-riscv64": "qemu-user",
    "/usr/riscv64-linux-gnu": "libc6-riscv64-cross",
    WINE: "wine64",
}
"""Of Debian, by the program or folder that they bring."""

pytestmark = [pytest.mark.systems, pytest.mark.slow]


@dataclass(frozen=True)
class Target:
    """A system and processor.

    `isas` are the instruction sets that are compiled, all of the processor's if there are none.
    `emulator` is what programs run under: nothing if it is empty. None: they cannot run here.
    """

    name: str
    isas: str = ""
    emulator: tuple[str, ...] | None = None


ZIG_TARGETS = [
    Target("aarch64-macos"),
    Target("x86_64-macos", "portable"),
    Target("x86_64-windows-gnu", "portable;avx2", (WINE,)),
    Target("aarch64-windows-gnu"),
    Target("x86_64-linux-musl", "portable;avx2", ()),
    Target("riscv64-linux-gnu", "portable", QEMU_RISCV),
]


def require(tools: Sequence[str]) -> None:
    """Skips the test unless these programs and folders are there."""
    for tool in tools:
        if tool in PACKAGES and shutil.which(tool) is None and not Path(tool).exists():
            pytest.skip(f"{tool} is missing: apt-get install {PACKAGES[tool]}")


def zig() -> Path:
    found = importlib.util.find_spec("ziglang")
    if found is None or not found.submodule_search_locations:
        pytest.skip("Zig is missing: pip install ziglang")
    return Path(found.submodule_search_locations[0]) / "zig"


def run(*arguments: str | Path) -> None:
    """Runs a tool for building; it must succeed."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # CMake, Ninja
        "WINEPREFIX": str(BUILDS / "wine"),
        "WINEDEBUG": "-all",
    }
    done = subprocess.run(
        [str(argument) for argument in arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-8000:]


def build(target: Target, *options: str | Path) -> Path:
    folder = BUILDS / target.name
    # What compiles fastest, of what runs fast enough.
    optimize = f"-DANYMAMBA_OPTIMIZE={'-O0' if target.emulator is None else '-O1'}"
    isas = f"-DANYMAMBA_ISAS={target.isas}"
    emulator = f"-DCMAKE_CROSSCOMPILING_EMULATOR={';'.join(target.emulator or ())}"
    options = (*COMMON, optimize, isas, emulator, *options)
    run("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *options)
    # pytest runs several targets beside each other.
    run("cmake", "--build", folder, "--parallel", "1", "--", "--quiet")
    return folder


def run_tests(folder: Path) -> None:
    run(
        "ctest", "--test-dir", folder, "--no-tests=error", "--timeout", "600", "--output-on-failure"
    )


def test_arm() -> None:
    target = Target("aarch64-linux-gnu", emulator=QEMU_ARM)
    compiler = "aarch64-linux-gnu-g++"
    require([compiler, *QEMU_ARM])
    system = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64")
    run_tests(build(target, *system, f"-DCMAKE_CXX_COMPILER={compiler}"))


@pytest.mark.parametrize("target", ZIG_TARGETS, ids=lambda target: target.name)
def test_zig(target: Target) -> None:
    toolchain = Path(__file__).with_name("zig.cmake")
    compiler = (f"-DZIG={zig()}", f"-DZIG_TARGET={target.name}")
    folder = build(target, f"-DCMAKE_TOOLCHAIN_FILE={toolchain}", *compiler)
    if target.emulator is None:
        return
    require(target.emulator)
    run_tests(folder)


def test_avx_vnni() -> None:
    """In AVX-512's encoding of its instruction, where the processor has that one alone."""
    flags = _flags_of_processor()
    if "avx_vnni" in flags or "avx512_vnni" not in flags:
        pytest.skip(
            "other tests run avx2_vnni, or the processor has neither AVX-VNNI nor AVX-512's"
        )
    run_tests(build(Target("evex-vnni", "avx2_vnni", ()), "-DANYMAMBA_EVEX_VNNI=ON"))


def _flags_of_processor() -> list[str]:
    described = Path("/proc/cpuinfo")
    return described.read_text(encoding="utf-8").split() if described.exists() else []


def test_clang_with_its_own_library() -> None:
    compiler = ("clang++", "-stdlib=libc++")
    probe = (*compiler, "-x", "c++", "-include", "new", "-fsyntax-only", "/dev/null")
    if (
        shutil.which("clang++") is None
        or subprocess.run(probe, capture_output=True).returncode != 0
    ):
        pytest.skip("Clang with libc++ is missing: apt-get install clang libc++-dev libc++abi-dev")
    flags = ("-DCMAKE_CXX_COMPILER=clang++", "-DCMAKE_CXX_FLAGS=-stdlib=libc++")
    run_tests(build(Target("clang-libc++", "portable", ()), *flags))


def test_microsofts_compiler_is_refused(tmp_path: Path) -> None:
    """By a message that names the one to take. No such compiler is needed: CMake is told of one."""
    lines = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("if(MSVC AND NOT"))
    last = next(i for i, line in enumerate(lines) if i > first and line == "endif()")
    script = tmp_path / "check.cmake"
    script.write_text("\n".join(lines[first : last + 1]), encoding="utf-8")

    def check(compiler: str, msvc: str) -> str:
        options = (f"-DCMAKE_CXX_COMPILER_ID={compiler}", f"-DMSVC={msvc}")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        command = [shutil.which("cmake", path=path) or "cmake", *options, "-P", str(script)]
        return subprocess.run(command, capture_output=True, encoding="utf-8").stderr

    assert "clang-cl" in check("MSVC", "ON")
    assert check("Clang", "ON") == ""
    assert check("AppleClang", "OFF") == ""
    assert check("GNU", "OFF") == ""
    assert "GCC or Clang" in check("Intel", "OFF")
