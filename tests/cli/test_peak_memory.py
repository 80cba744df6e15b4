"""The most memory that a process has held."""

import sys

import pytest

from tests.support import processes


def test_what_was_given_back_counts() -> None:
    program = """
from anymamba.cli.peak_memory import peak_memory
before = peak_memory()
block = bytearray(b"x") * 100_000_000
del block
print(before, peak_memory())
"""
    before, after = map(int, processes.python("-c", program, check=True).stdout.split())
    assert before > 1_000_000
    assert 90e6 < after - before < 150e6


@pytest.mark.skipif(sys.platform != "linux", reason="stands in for Windows")
def test_windows_is_asked_in_its_own_way() -> None:
    program = """
import resource
from tests.systems.other_system import become
become("windows")
from anymamba.cli.peak_memory import peak_memory
print(peak_memory(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
    told, held = map(int, processes.python("-c", program, check=True).stdout.split())
    assert 1_000_000 < told <= held < told + 10_000_000


def test_a_system_that_cannot_say_says_none() -> None:
    program = """
import ctypes, sys
from pathlib import Path
def refuse(*_, **__): raise OSError("there is no /proc")
Path.read_text, sys.modules["resource"] = refuse, None
vars(ctypes).pop("WinDLL", None)
from anymamba.cli.peak_memory import peak_memory
print(peak_memory())
"""
    assert processes.python("-c", program, check=True).stdout.split() == ["None"]
