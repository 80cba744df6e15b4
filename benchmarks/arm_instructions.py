"""How many instructions do products with quantized weights take on Arm?

Cross-compiles the core and counts the instructions that an emulator executes, so that no Arm
machine is needed: what is counted is what any of them executes. Two sizes are subtracted from each
other, which leaves the loops over weight rows. Needs Debian's g++-aarch64-linux-gnu and qemu-user.

The minimum beside them is counted by hand, for 32 registers of 16 bytes:

- decoding (one vector): each 16 bytes of weights are loaded once and multiplied, in halves if they
  hold 4 bits; four weight rows share a load of the vector; four rows' group is scaled by one
  multiplication.
- prefill (tiles of 8 rows times 8 weight rows): each 16 bytes of a tile's rows and weight rows are
  loaded once for 64 products of 16 bytes, or 32 products of matrices of 16 bytes; each group of a
  tile is scaled by one multiplication for four numbers.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from common.machine import describe
from common.options import options_from, parser
from common.results import finish
from common.tables import NAME, Column, Row, Table

ROOT = Path(__file__).resolve().parent.parent
# By the program that each brings.
PACKAGES = {"aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu", "qemu-aarch64": "qemu-user"}
# CMake and Ninja lie beside this Python.
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
GROUP, ROWS, COLUMNS = 128, 64, 1024
PROMPT = 64  # rows of x in a prefill
COUNTED = (
    NAME,
    Column("load", "loads", "{:.4f}"),
    Column("dot", "dot products", "{:.4f}"),
    Column("fma", "multiplications of floats", "{:.4f}"),
    Column("minimum", "minimum of the three", "{:.4f}"),
    Column("ratio", "x minimum", "{:.2f}"),
    Column("all", "all instructions", "{:.4f}"),
)
THREE = ("load", "dot", "fma")
# Of vectors; a pair of registers counts as two loads.
KINDS = {
    "load": re.compile(r"^(ldr|ldur) q|^ldp q|^(ld1r?|ldr) [{dvs]"),
    "fma": re.compile(r"^(fmla|fmul) v"),
}
# By their bits, for the disassemblers of some emulators do not know them: sdot and usdot, each by
# vector and by element, and usmmla (Arm Architecture Reference Manual, C4.1).
DOTS = (
    (0xFFE0FC00, 0x4E809400),
    (0xFFC0F400, 0x4F80E000),
    (0xFFE0FC00, 0x4E809C00),
    (0xFFC0F400, 0x4F80F000),
    (0xFFE0FC00, 0x4E80AC00),
)
BLOCK = re.compile(r"^IN: ?.*\n((?:0x.*\n)+)", re.MULTILINE)
INSTRUCTION = re.compile(r"^0x([0-9a-f]+): +([0-9a-f]{8}) +(.*)$", re.MULTILINE)
EXECUTED = re.compile(r"^Trace \d+: \S+ \[[0-9a-f]+/([0-9a-f]+)/", re.MULTILINE)


@dataclass(frozen=True)
class Case:
    """A product: the instruction set, the bits of a weight, and how many vectors it multiplies."""

    isa: str
    bits: int
    m: int

    @property
    def name(self) -> str:
        return f"{self.isa}, int{self.bits}, {'decode' if self.m == 1 else f'prefill of {self.m}'}"

    def minimum(self) -> float:
        """Loads, dot products, multiplications of floats for each byte of weights (and vector)."""
        numbers = 16 * 8 // self.bits  # of 16 bytes of weights
        if self.m == 1:
            products = numbers / 16
            return (1 + products + products / 4 + numbers / GROUP / 4) / 16
        matrices = self.isa == "neon_i8mm"
        # Of 16 steps of k of a tile, whose weights are 8 * 16 numbers.
        loads, products, scales = 8 + 8, 32 if matrices else 64, 16 * 16 / GROUP
        return (loads + products + scales) / (8 * 16 * self.bits / 8) / 8


def main() -> int:
    """Count, then print and write."""
    options = options_from(parser("arm_instructions", __doc__ or "").parse_args())
    missing = [package for program, package in PACKAGES.items() if shutil.which(program) is None]
    if missing:
        print(
            f"not counted, tools are missing: apt-get install {' '.join(missing)}", file=sys.stderr
        )
        return 2
    # A smoke run compiles one instruction set without optimizing.
    isas = ("neon_dotprod",) if options.quick else ("neon_dotprod", "neon_i8mm")
    program = build(f"-DANYMAMBA_ISAS={';'.join(isas)}", "-O0" if options.quick else "")
    rows = [
        measured(program, Case(isa, bits, m))
        for isa in isas
        for m in ((1,) if options.quick else (1, PROMPT))
        for bits in (8, 4)
    ]
    title = "Instructions for each byte of weights and each vector"
    finish("arm_instructions", options, describe(options.quick), [Table(title, COUNTED, rows)])
    return 0


def build(isas: str, optimize: str) -> Path:
    """The program for Arm."""
    folder = ROOT / "build" / f"arm_instructions{optimize}"
    toolchain = ROOT / "tests" / "systems" / "aarch64.cmake"
    configure = ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DANYMAMBA_TESTS=ON"]
    configure += [isas, f"-DANYMAMBA_OPTIMIZE={optimize}", "--log-level=WARNING"]
    configure += [f"-DCMAKE_TOOLCHAIN_FILE={toolchain}"]
    environment = {**os.environ, "PATH": PATH}
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL, env=environment)
    make = ["cmake", "--build", folder, "--target", "anymamba_core", "--", "--quiet"]
    subprocess.run(make, check=True, env=environment)
    program = folder / "arm_instructions"
    sources = [ROOT / "benchmarks" / "arm_instructions.cpp", folder / "libanymamba_core.a"]
    compiler = ["aarch64-linux-gnu-g++", "-std=gnu++20", "-O2", "-static", "-I", ROOT / "core"]
    subprocess.run([*compiler, *sources, "-lpthread", "-o", program], check=True)
    return program


def measured(program: Path, case: Case) -> Row:
    """A row of the table."""
    more, fewer = (executed(program, case, rows) for rows in (2 * ROWS, ROWS))
    more.subtract(fewer)
    weights = ROWS * COLUMNS * case.bits / 8 * case.m
    counts = {kind: more[kind] / weights for kind in (*THREE, "all")}
    three = sum(counts[kind] for kind in THREE)
    return {"name": case.name, **counts, "minimum": case.minimum(), "ratio": three / case.minimum()}


def executed(program: Path, case: Case, rows: int) -> Counter[str]:
    """How many instructions of each kind a product with so many weight rows executes."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = ["qemu-aarch64", "-cpu", "max", "-d", "in_asm,exec,nochain", "-D", log, program]
        command += [str(number) for number in (case.bits, case.m, rows, COLUMNS)]
        subprocess.run(command, check=True, env={**os.environ, "ANYMAMBA_ISA": case.isa})
        text = log.read_text(encoding="utf-8", errors="replace")
    times = Counter(int(address, 16) for address in EXECUTED.findall(text))
    counts: Counter[str] = Counter()
    for block in BLOCK.findall(text):
        instructions = INSTRUCTION.findall(block)
        times_of_block = times.pop(int(instructions[0][0], 16), 0)
        for _, word, words in instructions:
            counts["all"] += times_of_block
            for kind in kinds_of(word, words):
                counts[kind] += times_of_block
    return counts


def kinds_of(word: str, text: str) -> list[str]:
    """The kinds that an instruction counts as."""
    instruction = " ".join(text.split())
    kinds = [kind for kind, pattern in KINDS.items() if pattern.match(instruction)]
    if kinds == ["load"] and instruction.startswith("ldp"):
        return ["load", "load"]
    code = int(word, 16)
    return ["dot"] if any(code & mask == value for mask, value in DOTS) else kinds


if __name__ == "__main__":
    sys.exit(main())
