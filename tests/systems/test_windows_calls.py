"""What the package calls of Windows by ctypes has the layout that Windows' own headers give it."""

import ctypes
import os
from pathlib import Path

import pytest

from anymamba.cli.peak_memory import MemoryCounters
from tests.support import processes
from tests.systems.test_cross_builds import BUILDS, WINE, require, zig

pytestmark = [pytest.mark.systems, pytest.mark.slow]

PROGRAM = r"""
#include <stddef.h>
#include <stdio.h>
#include <windows.h>
#include <psapi.h>

int main(void) {
  PROCESS_MEMORY_COUNTERS counters = {0};
  counters.cb = sizeof counters;
  HMODULE kernel = LoadLibraryA("kernel32");
  typedef BOOL(WINAPI* Ask)(HANDLE, PROCESS_MEMORY_COUNTERS*, DWORD);
  Ask ask = (Ask)(void*)GetProcAddress(kernel, "K32GetProcessMemoryInfo");
  BOOL told = ask && ask(GetCurrentProcess(), &counters, counters.cb);
  printf("%d %d %d %d %d\n", (int)sizeof counters, (int)offsetof(PROCESS_MEMORY_COUNTERS, cb),
         (int)offsetof(PROCESS_MEMORY_COUNTERS, PeakWorkingSetSize),
         (int)offsetof(PROCESS_MEMORY_COUNTERS, PeakPagefileUsage),
         told && counters.PeakWorkingSetSize > 100000);
}
"""


def test_the_memory_of_a_process(tmp_path: Path) -> None:
    require([WINE])
    (tmp_path / "program.c").write_text(PROGRAM, encoding="utf-8")
    program = tmp_path / "program.exe"
    target = ("-target", "x86_64-windows-gnu")
    processes.run(zig(), "cc", *target, tmp_path / "program.c", "-o", program, check=True)
    BUILDS.mkdir(parents=True, exist_ok=True)  # Wine makes the last folder of its prefix alone
    settings = {"WINEPREFIX": str(BUILDS / "wine"), "WINEDEBUG": "-all"}
    done = processes.run(WINE, program, env=os.environ | settings, check=True)
    fields = (
        MemoryCounters.cb,
        MemoryCounters.PeakWorkingSetSize,
        MemoryCounters.PeakPagefileUsage,
    )
    ours = [ctypes.sizeof(MemoryCounters), *(field.offset for field in fields), 1]
    assert [int(number) for number in done.stdout.split()] == ours
