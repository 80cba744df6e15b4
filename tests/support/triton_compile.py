"""Compiles Triton's kernels for a GPU that is not here, as the operators launch them.

Run as a program, for Triton reads once a process whether to interpret: it takes the operators named
on the command line through `CASES` for one target, and prints a line of JSON for each launch: its
kernel, whether that is new or was compiled for an earlier launch, and the registers, spilled bytes
and shared memory that NVIDIA's assembler reports.

    TRITON_INTERPRET=0 python -m tests.support.triton_compile cuda:90 selective_scan ssd
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from common.triton_compile import compiled_only, resources

from tests.support.triton_cases import CASES


def main(target: str, names: list[str]) -> None:
    with compiled_only(target) as launches_of:
        for name, case in CASES.items():
            if names and not name.startswith(tuple(names)):
                continue
            for launch in launches_of(case):
                found: dict[str, Any] = {"kernel": f"{name}: {launch.name}", "new": launch.is_new}
                found |= {
                    "seconds": round(launch.seconds, 3),
                    "warps": launch.kernel.metadata.num_warps,
                }
                if "cubin" in launch.kernel.asm:
                    found |= resources(launch.kernel.asm["cubin"])
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
