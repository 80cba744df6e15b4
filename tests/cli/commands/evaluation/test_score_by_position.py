"""`anymamba score --by-position`."""

from pathlib import Path

import pytest

import anymamba as package
from anymamba.runtime.analysis.losses_by_position import loss_by_position
from tests.support.cli import Command

TEXT = "To be, or not to be: that is the question.\n" * 6


@pytest.fixture
def file(tmp_path: Path) -> Path:
    place = tmp_path / "a.txt"
    place.write_text(TEXT)
    return place


def test_figures_are_those_of_the_runtime(tiny: Path, file: Path, anymamba: Command) -> None:
    """What they mean is tested where they are made."""
    options = ("--by-position", "--window", 32, "--stride", 8, "--model", tiny)
    facts = anymamba("score", file, *options, "--json").json
    engine = package.load(tiny)
    expected = loss_by_position(engine, engine.tokenize(TEXT), 32, 8)
    assert [part["nats_per_token"] for part in facts["stretches"]] == [
        part.nats_per_token for part in expected
    ]
    assert (facts["window"], facts["stride"]) == (32, 8)
    assert facts["stretches"][0]["gain"] is None
    done = anymamba("score", file, *options)
    lines = done.out.splitlines()
    assert lines[2].split()[:4] == ["2", "to", "3", f"{expected[1].nats_per_token:.4f}"]


def test_it_is_said_plainly_how_far_context_helps(file: Path, anymamba: Command) -> None:
    options = ("--by-position", "--window", 64, "--stride", 16)
    helpful = anymamba("score", file, *options, "--json").json["helpful_context"]
    said = anymamba("score", file, *options).out.splitlines()[-1]
    assert helpful > 0
    assert f"{helpful} tokens" in said
    assert anymamba("score", file, "--by-position", "--window", 200).out.endswith(
        "take a longer text\n"
    )


@pytest.mark.parametrize(("kind", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_a_plot(kind: str, start: bytes, tiny: Path, file: Path, anymamba: Command) -> None:
    pytest.importorskip("matplotlib")
    plot = file.parent / f"losses.{kind}"
    options = ("--by-position", "--window", 32, "--model", tiny)
    assert anymamba("score", file, *options, "--plot", plot).status == 0
    assert plot.read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--window", 32), "--by-position"),
        (("--by-position",), "need 1024"),
        (("--by-position", "--window", 32, "--stride", 5), "stride of 5"),
        (("--by-position", "--plot", "a.html"), ".png or .svg"),
    ],
)
def test_mistakes(words: tuple[object, ...], reason: str, file: Path, anymamba: Command) -> None:
    assert reason in anymamba("score", file, *words).complaint
