"""Runs a script in a process of its own, where a crash is a failed test and not a lost run."""

from __future__ import annotations

import os
import subprocess
import sys


def run_python(
    *arguments: str, timeout: float = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Python with these arguments; `environment` is added to this process's own.

    What it writes to stderr comes after its stdout, with the stack where a signal ended it.
    """
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )


def assert_ends_well(result: subprocess.CompletedProcess[str]) -> str:
    """What it printed; fails with the end of that where the process was ended or failed."""
    end = "\n".join(line[:2000] for line in result.stdout.splitlines()[-60:])
    assert result.returncode == 0, f"ended with {result.returncode}:\n{end}"
    return result.stdout
