"""`anymamba inspect`: the figures, and the pictures of them."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import anymamba as package
from anymamba.runtime.analysis.inspection import inspect
from tests.support.cli import Command

TEXT = "ROMEO:\nWhat is <b>thy</b> name, good lady?"


def test_figures_are_those_of_the_runtime(tiny: Path, anymamba: Command) -> None:
    """What they mean is tested where they are made."""
    facts = anymamba("inspect", TEXT, "--model", tiny, "--after", 3, "--json").json
    engine = package.load(tiny)
    found = inspect(engine, engine.tokenize(TEXT), [3])
    assert facts["ages"] == list(found.ages)
    assert facts["picture"] is None
    for name, expected in (
        ("step_size", found.step_sizes_yl),
        ("retention", found.retention_yal),
        ("held", found.held_yl(3)),
        ("forgetting", found.forgetting_ya()),
        ("share_of_final_state", found.final_share_yl),
    ):
        got = np.array(facts[name], dtype=float)  # null becomes NaN
        np.testing.assert_allclose(got, expected, rtol=1e-5)  # six digits
    assert [token["text"] for token in facts["tokens"]][:8] == [*"ROMEO:↵W"]
    assert facts["held"][0][-3:] == [None] * 3
    assert None not in facts["held"][0][:-3]


def test_a_table_and_a_png_for_people(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anymamba: Command
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    done = anymamba("inspect", TEXT, "--model", tiny)
    assert done.status == 0, done.err
    facts = anymamba("inspect", TEXT, "--model", tiny, "--json").json
    held = facts["held"][0]
    best = max((value, place) for place, value in enumerate(held) if value is not None)[1]
    assert re.search(rf"^ +{best}  .*\[", done.out.split("most is left")[1], re.MULTILINE)
    assert "picture: inspection.png" in done.out
    assert (tmp_path / "inspection.png").read_bytes().startswith(b"\x89PNG")


class Page(HTMLParser):
    """Collects what a page shows, and what it would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.rows: list[str] = []
        self.titles: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "link"):
            self.open.append(tag)
        if tag == "td":
            self.rows.append("")
        self.titles += [value or "" for name, value in attributes if name == "title"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open:
            self.rows[-1] += data


def test_without_matplotlib_a_page_that_needs_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anymamba: Command
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("anymamba.cli.commands.text.inspect.find_spec", lambda name: None)
    assert "picture: inspection.html" in anymamba("inspect", TEXT, "--model", tiny).out
    text = (tmp_path / "inspection.html").read_text("utf-8")
    page = Page()
    page.feed(text)
    assert page.open == []
    assert not {"script", "link", "img"} & set(page.tags)
    assert "http" not in text
    shown = TEXT.replace(" ", "␣").replace("\n", "↵")
    assert page.rows[:3] == [shown] * 3  # one layer, three maps
    facts = anymamba("inspect", TEXT, "--model", tiny, "--json").json
    assert f"R: {facts['step_size'][0][0]:.4f}" in page.titles


def test_a_named_png_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anymamba: Command
) -> None:
    monkeypatch.setattr("anymamba.cli.terminal.plot_file.find_spec", lambda name: None)
    done = anymamba("inspect", TEXT, "--picture", tmp_path / "a.png")
    assert "pip install matplotlib" in done.complaint
    assert ".html" in done.complaint


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("a", "--json"), "2 to 4,096"),
        (("a" * 5000, "--json"), "5,000"),
        (("abc", "--after", "3", "--json"), "3 steps"),
        (("abc", "--picture", "a.gif"), ".gif"),
        (("abc", "--picture", "nowhere/a.html"), "nowhere"),
        (("abc", "--picture", "."), "ends in"),
    ],
)
def test_mistakes(
    words: tuple[str, ...],
    reason: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    anymamba: Command,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert reason in anymamba("inspect", *words, "--model", tiny).complaint
    assert list(tmp_path.iterdir()) == []


def test_characters_of_several_bytes_and_formulas(
    tiny: Path, tmp_path: Path, anymamba: Command
) -> None:
    pytest.importorskip("matplotlib")
    text = "été $x^2$ \N{GRINNING FACE} a\tb \\frac"
    for kind in ("png", "html"):
        done = anymamba("inspect", text, "--model", tiny, "--picture", tmp_path / f"a.{kind}")
        assert done.status == 0, done.err


def test_no_screen_and_no_torch_is_asked_for(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom anymamba.cli.main import main\n"
        f"status = main(['inspect', 'ROMEO:', '--picture', {str(tmp_path / 'a.html')!r}])\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)\nsys.exit(status)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
