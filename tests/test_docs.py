"""What the documentation says is true: its snippets run, its links lead somewhere.

A fence says how its text is checked. `python` snippets of one file run in order, in one process
and one namespace, as a reader would type them. `bash` snippets run in a shell. `text` is shown and
not run. `javascript` snippets run in Node.js, and find the server at the address that they name.
There is no other kind, so that nothing escapes by accident.
"""

import os
import re
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest

import anymamba
from tests.support import processes
from tests.support.warm import Warm

ROOT = Path(__file__).parent.parent
README, IN_CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
PAGES = [README, IN_CHINESE, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
KINDS = {"python", "bash", "javascript", "text"}


@dataclass
class Snippet:
    """The text between two fences, and the number of its first line in the page."""

    kind: str
    line: int
    text: str


def snippets(page: Path) -> list[Snippet]:
    found: list[Snippet] = []
    inside = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if line.lstrip().startswith("```"):
            inside = not inside
            if inside:
                found.append(Snippet(line.strip().removeprefix("```"), number + 1, ""))
        elif inside:
            found[-1].text += line + "\n"
    assert not inside, f"{page.name}: a fence is never closed"
    return found


def names_of_pages_with(kind: str) -> list[str]:
    return [
        name
        for name, page in zip(NAMES, PAGES, strict=True)
        # A test holds the translation's snippets to be the README's.
        if page != IN_CHINESE and any(snippet.kind == kind for snippet in snippets(page))
    ]


def at_their_lines(pieces: list[Snippet]) -> str:
    """One program whose line numbers are the page's, for tracebacks that lead to the snippet."""
    program = ""
    for piece in pieces:
        program += "\n" * (piece.line - 1 - program.count("\n")) + piece.text
    return program


def run(command: list[str], folder: Path, warm: Warm) -> None:
    """Run in an empty folder, without a network; show what was printed if it fails."""
    path = os.pathsep.join(
        [str(warm.commands), str(Path(sys.executable).parent), os.environ["PATH"]]
    )
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder)}
    done = processes.run(*command, cwd=folder, env=environment)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_fence_says_how_it_is_checked(page: Path) -> None:
    for snippet in snippets(page):
        assert snippet.kind in KINDS, f"line {snippet.line - 1}: ```{snippet.kind}"


@pytest.mark.slow
@pytest.mark.parametrize("name", names_of_pages_with("python"))
def test_python_snippets_run(name: str, warm: Warm, tmp_path: Path) -> None:
    pieces = [snippet for snippet in snippets(ROOT / name) if snippet.kind == "python"]
    # Not by the page's name alone: a program named inspect.py would hide a module of Python's.
    program = tmp_path / f"page_{Path(name).stem}.py"
    program.write_text(at_their_lines(pieces), encoding="utf-8")
    run([warm.python, str(program)], tmp_path, warm)


@pytest.mark.slow
@pytest.mark.parametrize("name", names_of_pages_with("bash"))
def test_commands_run(name: str, warm: Warm, tmp_path: Path) -> None:
    for snippet in snippets(ROOT / name):
        if snippet.kind == "bash":
            run(["bash", "-euo", "pipefail", "-c", snippet.text], tmp_path, warm)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node.js")
@pytest.mark.parametrize("name", names_of_pages_with("javascript"))
def test_javascript_snippets_run(name: str, tmp_path: Path) -> None:
    from tests.server.conftest import serving

    engine = anymamba.load()
    with serving(engine) as address:
        for snippet in snippets(ROOT / name):
            if snippet.kind == "javascript":
                program = tmp_path / "snippet.mjs"
                text = re.sub(r"http://127\.0\.0\.1:\d+", address, snippet.text)
                program.write_text(text, encoding="utf-8")
                done = processes.run("node", program, cwd=tmp_path, timeout=60)
                assert done.returncode == 0, done.stderr
                assert done.stdout == engine.generate("ROMEO:", max_new_tokens=20).text


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        place = (page.parent / name) if name else page
        assert place.exists(), target
        if anchor:
            assert anchor in anchors(place), target


def anchors(page: Path) -> set[str]:
    """The anchors that code hosts make of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_make_has_the_targets_that_are_named(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", page.read_text(encoding="utf-8"), re.MULTILINE))
    assert named <= targets


def test_every_page_is_reached_from_the_readme() -> None:
    readme = README.read_text(encoding="utf-8")
    assert [name for name in NAMES[1:] if f"({name})" not in readme] == []


@pytest.mark.parametrize("picture", list((ROOT / "docs").glob("*.svg")), ids=lambda path: path.name)
def test_pictures_are_well_formed_and_say_what_they_show(picture: Path) -> None:
    root = ElementTree.parse(picture).getroot()
    assert root.get("viewBox")
    assert root.findtext("{http://www.w3.org/2000/svg}desc")


def commands(page: Path) -> list[tuple[str, str]]:
    """Each snippet's kind and text, without the explanations beside the lines of a `text`."""
    return [
        (piece.kind, re.sub(r"  .*", "", piece.text) if piece.kind == "text" else piece.text)
        for piece in snippets(page)
    ]


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def test_the_chinese_readme_has_the_same_commands() -> None:
    assert commands(IN_CHINESE) == commands(README)


@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param(r"\d+(?:[.,]\d+)*", id="figures"),
        pytest.param(r"`[^`]+`", id="names in code"),
        pytest.param(r"^#+ ", id="headings"),
        pytest.param(r"\]\(([^)#\s]+)\)", id="links"),
    ],
)
def test_the_chinese_readme_has_the_same(pattern: str) -> None:
    english, chinese = (
        Counter(re.findall(pattern, prose(page), flags=re.M)) for page in (README, IN_CHINESE)
    )
    for other in (IN_CHINESE.name, README.name):  # each links to the other
        english.pop(other, None)
        chinese.pop(other, None)
    assert chinese == english
