"""`anymamba info` without a model: the build, its instruction sets, and what a faster one needs."""

import os
import re
import sysconfig
from importlib.metadata import PackageNotFoundError

import pytest

from anymamba import _core, load
from anymamba.cli.describe import installation
from anymamba.cli.describe.installation import wheel_line
from anymamba.cli.describe.instruction_sets import describe_sets, faster
from tests.support import processes

X86_SETS = ["avx512_bf16", "avx512", "avx2_vnni", "avx2", "portable"]
ARM_SETS = ["neon_i8mm", "neon_dotprod", "neon"]


def test_this_machine(anymamba):
    facts = anymamba("info", "--json").json
    states = {row["name"]: row["state"] for row in facts["instruction_sets"]}
    assert [name for name, state in states.items() if state == "in use"] == [_core.isa()]
    here = {name for name, state in states.items() if state in ("in use", "available")}
    assert here == set(_core.isas())
    built = {name for name, state in states.items() if state != "not built"}
    assert built == set(_core.built_isas.split())
    assert facts["threads"] == load().threads
    assert facts["core_build"] == f"{_core.compiler} for {_core.system}"
    text = anymamba("info").out
    for row in facts["instruction_sets"]:
        assert re.search(
            rf"^  {row['name']} +{row['state']} +{re.escape(row['needs'])}$", text, re.M
        )
    assert re.search(rf"^faster +{re.escape(facts['faster'])}$", text, re.M)


def test_the_wheel_is_this_python_s(anymamba):
    (tag,) = anymamba("info", "--json").json["wheel"]["tags"]
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert tag.split("-")[-1].split("_")[0] == platform.split("_")[0]
    assert tag.startswith("cp3")
    assert tag in anymamba("info").out


def test_a_slower_set_that_was_asked_for_is_said():
    program = (
        "import sys\n"
        "sys.modules['torch'] = None  # whose import takes seconds\n"
        "from anymamba.cli.main import main\n"
        "main(['info'])\n"
    )
    fastest, slowest = _core.isas()[0], _core.isas()[-1]
    environment = {**os.environ, "ANYMAMBA_ISA": slowest}
    done = processes.python("-c", program, env=environment, check=True)
    told = "" if fastest == slowest else f"unset ANYMAMBA_ISA: {fastest} is here"
    assert re.search(rf"^faster +{told}", done.stdout, re.M)


@pytest.mark.parametrize(
    ("machine", "here", "built", "expected"),
    [
        ("x86_64", ["avx512_bf16", "avx512", "avx2", "portable"], X86_SETS, "nothing"),
        # Intel's processors are faster without its instructions for bfloat16.
        ("x86_64", ["avx512", "avx512_bf16", "avx2", "portable"], X86_SETS, "nothing"),
        (
            "x86_64",
            ["avx512", "avx2", "portable"],
            X86_SETS,
            "a processor with AVX-512 with VNNI an",
        ),
        ("AMD64", ["avx2_vnni", "avx2", "portable"], X86_SETS, r"a processor with AVX-512 \(F, BW"),
        ("AMD64", ["avx2", "portable"], X86_SETS, "a processor with AVX2, FMA, F16C and AVX-VNNI"),
        ("x86_64", ["portable"], X86_SETS, "a processor with AVX2, FMA and F16C, such as Intel"),
        ("x86_64", ["portable"], ["portable"], "a build that has avx2, and a processor with AVX2"),
        ("arm64", ARM_SETS, ARM_SETS, "nothing"),
        ("ARM64", ARM_SETS[1:], ARM_SETS, r"a processor with I8MM and BF16 \(Armv8.6\), such as"),
        ("aarch64", ARM_SETS[2:], ARM_SETS, "a processor with dot products and float16"),
        ("riscv64", ["portable"], ["portable"], "nothing: there is no faster set for this kind of"),
    ],
)
def test_what_a_faster_one_would_need(machine, here, built, expected):
    sets = describe_sets(here[0], here, built, machine)
    assert re.match(expected, faster(sets, here[0]))
    assert {row["name"] for row in sets if row["state"] in ("in use", "available")} == set(here)


def test_sets_of_other_machines_are_not_listed():
    names = [row["name"] for row in describe_sets("neon", ["neon"], ARM_SETS, "arm64")]
    assert names == ARM_SETS


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({}, "without tags"),
        (
            {"WHEEL": "Wheel-Version: 1.0\nTag: cp312-abi3-macosx_11_0_arm64\n"},
            "cp312-abi3-macosx_11_0_arm64",
        ),
        (
            {
                "WHEEL": "Tag: cp311-cp311-linux_x86_64\n",
                "direct_url.json": '{"url": "file:///src", "dir_info": {"editable": true}}',
            },
            "cp311-cp311-linux_x86_64 (editable, from file:///src)",
        ),
        (
            {
                "WHEEL": "Tag: a-b-manylinux_2_27_x86_64\nTag: a-b-manylinux_2_28_x86_64\n",
                "direct_url.json": '{"url": "https://example.org/a.tar.gz", "archive_info": {}}',
            },
            "a-b-manylinux_2_27_x86_64, a-b-manylinux_2_28_x86_64 (from https://example.org/a.tar.gz)",
        ),
    ],
)
def test_wheels_in_words(files, line, monkeypatch):
    class Installed:
        @staticmethod
        def from_name(name):
            return Installed

        read_text = staticmethod(files.get)

    monkeypatch.setattr(installation, "Distribution", Installed)
    assert wheel_line(installation.wheel()) == line


def test_sources_that_were_not_installed(monkeypatch):
    class Installed:
        @staticmethod
        def from_name(name):
            raise PackageNotFoundError(name)

    monkeypatch.setattr(installation, "Distribution", Installed)
    assert wheel_line(installation.wheel()) == "none: this runs from a folder of its sources"
