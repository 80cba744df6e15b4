"""The instruction sets of the native core: which are here, and what a faster one would need.

The table of docs/systems.md has the same rows, in the same words.
"""

from __future__ import annotations

import platform
from collections.abc import Collection
from dataclasses import dataclass

X86, ARM = ("x86_64", "amd64"), ("aarch64", "arm64")  # as systems spell them, in small letters


@dataclass(frozen=True)
class InstructionSet:
    """An instruction set that the core may be compiled for.

    Args:
        name: what the core and `ANYMAMBA_ISA` call it.
        machines: names of the machine that it is for; none if it is for all.
        needs: what of the processor.
        found_in: processors that have it.
    """

    name: str
    machines: tuple[str, ...]
    needs: str
    found_in: str


INSTRUCTION_SETS = (
    InstructionSet(
        "avx512_bf16",
        X86,
        "AVX-512 with VNNI and BF16",
        "AMD from Zen 4 (2022); Intel Xeon from Sapphire Rapids (2023), which avx512 suits better",
    ),
    InstructionSet(
        "avx512",
        X86,
        "AVX-512 (F, BW, DQ, VL) with VNNI",
        "Intel Xeon from Cascade Lake (2019), Intel Core of 2019 to 2021, AMD from Zen 4 (2022)",
    ),
    InstructionSet(
        "avx2_vnni",
        X86,
        "AVX2, FMA, F16C and AVX-VNNI",
        "Intel Core from Alder Lake (2021), AMD from Zen 5 (2024)",
    ),
    InstructionSet(
        "avx2", X86, "AVX2, FMA and F16C", "Intel from Haswell (2013), AMD from Zen (2017)"
    ),
    InstructionSet(
        "neon_i8mm",
        ARM,
        "I8MM and BF16 (Armv8.6)",
        "Apple from M2 (2022), AWS from Graviton3 (2022), Snapdragon X (2024), "
        "Arm Neoverse N2 and V1",
    ),
    InstructionSet(
        "neon_dotprod",
        ARM,
        "dot products and float16 (Armv8.2)",
        "Apple M1 (2020), AWS Graviton2 (2019), Raspberry Pi 5",
    ),
    InstructionSet("neon", ARM, "64-bit Arm", "all 64-bit Arm processors"),
    InstructionSet("portable", (), "nothing", "all processors"),
)
"""All of them, on each machine the fastest first."""


def describe_sets(
    used: str, here: Collection[str], built: Collection[str], machine: str | None = None
) -> list[dict[str, str]]:
    """What there is to say of each instruction set for this machine.

    Args:
        used: the one that the core computes with.
        here: those that this machine has and the core was compiled for.
        built: those that the core was compiled for.
        machine: what the machine is called, by default as this system calls it.

    Returns:
        For each set its "name", its "state" ("in use", "available", "not built", or "lacking" where
        the processor does not have it), what it "needs" and where that is "found_in".

    Example:
        >>> built = ["avx512", "avx2", "portable"]
        >>> sets = describe_sets("avx2", ["avx2", "portable"], built, "AMD64")
        >>> [(row["name"], row["state"]) for row in sets][1:4]
        [('avx512', 'lacking'), ('avx2_vnni', 'not built'), ('avx2', 'in use')]
    """
    called = (machine or platform.machine()).lower()

    def state(name: str) -> str:
        if name == used:
            return "in use"
        if name in here:
            return "available"
        return "lacking" if name in built else "not built"

    ours = [one for one in INSTRUCTION_SETS if called in one.machines or one.name in built]
    return [
        {"name": one.name, "state": state(one.name), "needs": one.needs, "found_in": one.found_in}
        for one in ours
    ]


def faster(sets: list[dict[str, str]], fastest_here: str) -> str:
    """What it would take to compute faster than with the set that is in use.

    Args:
        sets: what `describe_sets` returns.
        fastest_here: the set that the core takes by itself.

    Example:
        >>> sets = describe_sets("neon", ["neon"], ["neon_dotprod", "neon"], "arm64")
        >>> print(faster(sets, "neon"))
        a processor with dot products and float16 (Armv8.2), such as Apple M1 (2020), AWS \
Graviton2 (2019), Raspberry Pi 5
        >>> sets = describe_sets("neon", ["neon_i8mm", "neon"], ["neon_i8mm", "neon"], "arm64")
        >>> faster(sets, "neon_i8mm")
        'unset ANYMAMBA_ISA: neon_i8mm is here'
    """
    states = {row["name"]: row["state"] for row in sets}
    if states[fastest_here] != "in use":
        return f"unset ANYMAMBA_ISA: {fastest_here} is here"
    better = sets[: list(states).index(fastest_here)]
    # What is available and still not taken is slower on this processor, as its BF16 is on Intel's.
    missing = [row for row in better if row["state"] != "available"]
    if not missing:
        return "nothing: there is no faster set for this kind of processor"
    nearest = missing[-1]
    wanted = f"a processor with {nearest['needs']}, such as {nearest['found_in']}"
    if nearest["state"] == "not built":
        return f"a build that has {nearest['name']}, and {wanted}"
    return wanted
