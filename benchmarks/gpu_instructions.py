"""How many instructions does the scan take on a GPU for a state and step? Counted, not timed."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from anymamba import ops
from common.machine import describe
from common.options import options_from, parser
from common.results import finish
from common.tables import NAME, NOTE, Column, Row, Table

ARCHITECTURES = {"cuda:80": "sm_80 (A100)", "cuda:90": "sm_90 (H100)"}
THREADS = 32
FLOATS = ("FADD", "FMUL", "FFMA")
EXPONENTIAL = "MUFU.EX2"
# What a state and step cannot do without, in instructions of one thread:
# forward, delta A, exp2, the input, the state, the output;
FORWARD = 5
# of a last state, of a split or before the next chunk, delta A, exp2, the input, the sum;
ENDS = 4
# backward, delta A, exp2, own input, state, given gradient, gradient, y (for the gate), dx, what
# depends on the decay (2), ddelta, dA, the products for dB and dC, and for the sums of these over
# channels an exchange and an addition each.
BACKWARD = 18
# The loops over states in each kernel, the shortest first.
LOOPS = {
    "scan_kernel": {"scan_kernel": FORWARD},
    "split_ends_kernel": {"split_ends_kernel": ENDS},
    "scan_backward_kernel": {
        "scan_backward_kernel, states again": ENDS,
        "scan_backward_kernel, gradients": BACKWARD,
    },
}
COUNT = Column("all", "instructions", "{:.1f}")
MINIMUM = Column("minimum", "by hand, at least", "{:.0f}")
OVER = Column("over_minimum", "x minimum", "{:.2f}")
FLOAT = Column("floats", "of floats", "{:.1f}")
EXP2 = Column("exponentials", "exp2", "{:.1f}")
EXCHANGES = Column("exchanges", "between threads", "{:.1f}")
SPILLS = Column("spills", "of spilled registers", "{:.1f}")
REGISTERS = Column("registers", "registers a thread", "{:.0f}")
SECONDS = Column("seconds", "compiled in, s", "{:.1f}")
COLUMNS = (*(NAME, COUNT, MINIMUM, OVER, FLOAT, EXP2, EXCHANGES, SPILLS, REGISTERS, SECONDS, NOTE),)


def main() -> int:
    """Compile, disassemble, count; print and write. 2 where Triton is missing or interpreted."""
    options = options_from(parser("gpu_instructions", __doc__ or "").parse_args())
    reason = missing()
    if reason is not None:
        print(f"not counted: {reason}", file=sys.stderr)
        return 2
    architectures = ["cuda:90"] if options.quick else list(ARCHITECTURES)
    tables = [counted(architecture) for architecture in architectures]
    finish("gpu_instructions", options, describe(options.quick), tables)
    return 0


def missing() -> str | None:
    """Why nothing can be compiled, or None."""
    if find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        return "TRITON_INTERPRET is set, and interpreted kernels are not compiled"
    return None


def counted(architecture: str) -> Table:
    """The innermost loops of the scan's kernels, compiled for one architecture."""
    from common.triton_compile import compiled_only

    table = Table(
        f"The scan's loops for {ARCHITECTURES[architecture]}, bfloat16, gate, D, softplus, "
        f"{THREADS} channels of a warp: instructions for a state and step",
        COLUMNS,
    )
    with compiled_only(architecture) as launches_of:
        for launch in launches_of(partial(scan, 1, 256, 1536, 16)):
            if launch.name in LOOPS:
                table.rows += rows_of(launch)
    return table


def scan(b: int, l: int, e: int, n: int) -> None:
    """Forward and backward of a batch too small for a GPU, so that it is cut into splits."""
    halves = torch.zeros(b, l, 2 * e, dtype=torch.bfloat16).requires_grad_()
    x, z = halves.chunk(2, -1)
    maps = torch.zeros(b, l, n, dtype=torch.bfloat16)
    rates, vector = torch.zeros(e, n).requires_grad_(), torch.zeros(e)
    y = ops.selective_scan(x, x, rates, maps, maps, vector, z, vector, delta_softplus=True)
    assert isinstance(y, Tensor)
    torch.autograd.backward(y, torch.zeros_like(y))


def rows_of(launch: Any) -> list[Row]:
    """The counts of a kernel's loops over states, by state and step."""
    from common.triton_compile import disassembled, resources

    cubin = launch.kernel.asm["cubin"]
    parts = launch.arguments["T"] * launch.arguments["E"] / THREADS
    loops, minima = loops_over_states(disassembled(cubin)), LOOPS[launch.name]
    if len(loops) != len(minima):
        raise ValueError(f"{launch.name} has {len(loops)} loops over states, not {len(minima)}")
    rows = []
    for instructions, (name, minimum) in zip(loops, minima.items(), strict=True):
        found = Counter(kind_of(text) for text in instructions)
        total = sum(found.values()) / parts
        rows.append(
            {
                "name": name,
                "all": total,
                "minimum": minimum,
                "over_minimum": total / minimum,
                "floats": sum(found[kind] for kind in FLOATS) / parts,
                "exponentials": found[EXPONENTIAL] / parts,
                "exchanges": found["SHFL"] / parts,
                "spills": (found["LDL"] + found["STL"]) / parts,
                "registers": resources(cubin)["REG"],
                "seconds": launch.seconds,
                "note": "",
            }
        )
    return rows


def loops_over_states(program: Sequence[tuple[int, str]]) -> list[list[str]]:
    """The loops that compute exponentials, without such a loop inside, the shortest first."""
    found: list[tuple[int, int]] = []
    for address, text in program:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            found.append((int(target[1], 16), address))
    bodies = {
        (first, last): [text for at, text in program if first <= at <= last]
        for first, last in found
    }
    loops = {at: body for at, body in bodies.items() if any(EXPONENTIAL in t for t in body)}
    innermost = [
        body
        for (first, last), body in loops.items()
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in loops)
    ]
    return sorted(innermost, key=len)


def kind_of(text: str) -> str:
    """An instruction's name without its predicate, and without all modifiers but that of exp2."""
    name = re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]
    return EXPONENTIAL if name.startswith(EXPONENTIAL) else name.partition(".")[0]


if __name__ == "__main__":
    sys.exit(main())
