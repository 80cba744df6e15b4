"""Runs programs in processes of their own, where a crash is a failed test and not a lost run."""

import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any


def module_from(script: Path, name: str) -> ModuleType:
    """A script as a module: what it imports takes seconds in a process of its own."""
    spec = spec_from_file_location(name, script)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def run(*command: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """A command that ended, and what it wrote; `options` are those of `subprocess.run`."""
    usual = {"capture_output": True, "text": True, "check": False, "timeout": 600}
    return subprocess.run([str(part) for part in command], **usual | options)


def python(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The same for this Python."""
    return run(sys.executable, *arguments, **options)


def imported_by(script: str, *arguments: object) -> set[str]:
    """All modules that are there at the end of a script, which must end well."""
    program = f"import sys\n{script}\nprint('\\n', *sys.modules)"
    done = python("-c", program, *arguments, check=True, input="")
    return set(done.stdout.splitlines()[-1].split())


def run_python(
    *arguments: str, timeout: float = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Python with these arguments; `environment` is added to this process's own.

    What it writes to stderr comes after its stdout, with the stack where a signal ended it.
    """
    return python(
        *("-X", "faulthandler", *arguments),
        env=os.environ | environment,
        capture_output=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout,
    )


def assert_ends_well(result: subprocess.CompletedProcess[str]) -> str:
    """What it printed; fails with the end of that where the process was ended or failed."""
    end = "\n".join(line[:2000] for line in result.stdout.splitlines()[-60:])
    assert result.returncode == 0, f"ended with {result.returncode}:\n{end}"
    return result.stdout
