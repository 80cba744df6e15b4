"""Python for 64-bit Arm under an emulator, in a folder that is kept from one run to the next.

Debian's arm64 packages are unpacked, not installed: nothing of this machine changes.
AnyMamba's wheel is cross-compiled for that Python, and what it needs comes as wheels for Arm.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.support import processes, wheels

ROOT = Path(__file__).parents[2]
TOOLCHAIN = Path(__file__).with_name("aarch64.cmake")
TOOLS = {
    "apt-get": "this is no Debian",
    "dpkg-deb": "apt-get install dpkg",
    "aarch64-linux-gnu-g++": "apt-get install g++-aarch64-linux-gnu",
    "qemu-aarch64": "apt-get install qemu-user",
}
# Python, and the libraries that its modules and those of the wheels need.
PACKAGES = [
    "libbz2-1.0",
    "libc6",
    "libcrypt1",
    "libexpat1",
    "libffi8",
    "libgcc-s1",
    "liblzma5",
    "libpython3.11-dev",
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "libsqlite3-0",
    "libssl3",
    "libstdc++6",
    "libuuid1",
    "python3.11-minimal",
    "zlib1g",
]
REQUIREMENTS = ["huggingface_hub", "hypothesis", "numpy", "pytest", "safetensors", "tokenizers"]
PLATFORMS = [f"--platform=manylinux_2_{version}_aarch64" for version in (17, 28, 34)]


def missing() -> str | None:
    """What this machine lacks, and the line that installs it; None if it has everything."""
    for tool, remedy in TOOLS.items():
        if shutil.which(tool) is None:
            return f"{tool} is missing: {remedy}"
    if sys.version_info[:2] != (3, 11):
        return "the Arm Python of Debian 12 is 3.11: make the environment with python3.11"
    return None


class ArmPython:
    """The emulated Python.

    Args:
        folder: where everything is kept; what is there already is used again.
    """

    def __init__(self, folder: Path) -> None:
        self.root, self.site, self._wheels = (folder / n for n in ("root", "site", "wheels"))
        self._folder = folder

    def run(self, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        """A command line of this Python; processes that it starts would not be emulated."""
        python = self.root / "usr" / "bin" / "python3.11"
        environment = {**os.environ, "PYTHONPATH": str(self.site), "PYTHONDONTWRITEBYTECODE": "1"}
        emulator = ["qemu-aarch64", "-cpu", "max", "-L", self.root]
        return processes.run(*emulator, python, *arguments, env=environment, **options)

    def install(self) -> Path:
        """Bring everything up to date.

        Returns:
            AnyMamba's wheel.
        """
        complete = self._folder / "complete"
        wanted = " ".join([*PACKAGES, *REQUIREMENTS])
        if not complete.is_file() or complete.read_text(encoding="utf-8") != wanted:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._unpack_packages()
            self._unpack_requirements()
            complete.write_text(wanted, encoding="utf-8")
        shutil.rmtree(self.site / "anymamba", ignore_errors=True)
        wheel = self._cross_build()
        _unpack(wheel, self.site)
        return wheel

    def _unpack_packages(self) -> None:
        archives = self._folder / "archives"
        archives.mkdir(parents=True)
        # Lists of packages of its own: this machine's are left as they are.
        options = ["-o", "APT::Architecture=arm64", "-o", "APT::Architectures=arm64"]
        for setting, name in (("State::Lists", "lists"), ("Cache", "cache")):
            (self._folder / name / "partial").mkdir(parents=True)
            options += ["-o", f"Dir::{setting}={self._folder / name}"]
        options += ["-o", "Dir::State::status=/dev/null"]
        _checked("apt-get", *options, "update")
        _checked("apt-get", *options, "download", *PACKAGES, cwd=archives)
        for archive in archives.iterdir():
            _checked("dpkg-deb", "--extract", archive, self.root)
        headers = self.root / "usr" / "include"
        # Debian's pyconfig.h includes the processor's by this path.
        (headers / "python3.11" / "aarch64-linux-gnu").symlink_to(headers / "aarch64-linux-gnu")

    def _unpack_requirements(self) -> None:
        options = ["--only-binary=:all:", "--python-version=3.11", *PLATFORMS]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", self._wheels]
        _checked(*pip, *options, *REQUIREMENTS)
        for wheel in self._wheels.iterdir():
            _unpack(wheel, self.site)

    def _cross_build(self) -> Path:
        # The build asks Python for its platform and its modules' ending: this describes the other.
        described = self._folder / "described"
        described.mkdir(exist_ok=True)
        name = "_sysconfigdata__aarch64-linux-gnu"
        shutil.copy(self.root / "usr" / "lib" / "python3.11" / f"{name}.py", described)
        shutil.rmtree(self._folder / "wheel", ignore_errors=True)
        done = wheels.pip_wheel(
            sys.executable,
            ROOT,
            self._folder / "wheel",
            f"build-dir={self._folder / 'build'}",
            f"cmake.toolchain-file={TOOLCHAIN}",
            f"cmake.define.Python_INCLUDE_DIR={self.root / 'usr' / 'include' / 'python3.11'}",
            env={
                **os.environ,
                **wheels.compiler_cache(),
                "ANYMAMBA_REQUIRE_NATIVE": "1",
                "PYTHONPATH": str(described),
                "_PYTHON_HOST_PLATFORM": "linux-aarch64",
                "_PYTHON_SYSCONFIGDATA_NAME": name,
            },
        )
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
        (wheel,) = (self._folder / "wheel").glob("*.whl")
        assert re.fullmatch(r"anymamba-[\d.]+-cp311-cp311-linux_aarch64\.whl", wheel.name)
        return wheel


def _checked(*command: object, cwd: Path = ROOT) -> None:
    done = processes.run(*command, cwd=cwd)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-3000:]}")


def _unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
