"""Pages say of instruction sets what the code says, which has those that CMake builds."""

import re
from pathlib import Path

import pytest

from anymamba.cli.describe.instruction_sets import INSTRUCTION_SETS

ROOT = Path(__file__).parent.parent
CMAKE = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")


def built(command: str, first: str) -> list[str]:
    """The names that a line of CMakeLists.txt has, in the order of the code."""
    pattern = rf"^ *{re.escape(command)} ({first}\b[a-z0-9_ ]*)\)"
    (line,) = re.findall(pattern, CMAKE, re.MULTILINE)
    names = line.split()
    assert set(names) <= {one.name for one in INSTRUCTION_SETS}
    return [one.name for one in INSTRUCTION_SETS if one.name in names]


ALL = built("set(ALL_ISAS", "portable")
INTEL_MAC = [*built("list(APPEND ISAS", "avx2"), "portable"]
X86, ARM = [*built("list(APPEND ISAS", "avx2_vnni"), *INTEL_MAC], built("set(ISAS", "neon")


def test_the_page_of_systems_has_the_code_s_rows() -> None:
    page = (ROOT / "docs" / "systems.md").read_text(encoding="utf-8")
    begin, end = "<!-- src/anymamba/cli/describe/instruction_sets.py -->\n\n", "<!-- end -->"
    rows = page.partition(begin)[2].partition(end)[0].splitlines()[2:]
    assert rows == [f"| `{one.name}` | {one.needs} | {one.found_in} |" for one in INSTRUCTION_SETS]


def test_the_code_has_those_of_cmake() -> None:
    assert [one.name for one in INSTRUCTION_SETS] == ALL
    assert sorted(ALL) == sorted({*X86, *ARM})


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_a_readme_lists_what_cmake_builds_for_a_processor(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]*\| ([^|]+) \| (`portable`|[^|]*`[a-z].*`) \|$", text, re.MULTILINE)
    listed = [(processor, re.findall(r"`(\w+)`", names)) for processor, names in rows]
    listed = [row for row in listed if set(row[1]) & set(ALL)]
    *ours, (_, others) = listed
    assert len(ours) == 6
    assert others == ["portable"]
    for processor, names in ours:
        sets = ARM if re.search("Arm|M1", processor) else INTEL_MAC if "x" not in processor else X86
        assert names == sets, processor
