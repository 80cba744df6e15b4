"""`anymamba score`: how well a text is predicted."""

import math

import numpy as np
import pytest

from tests.support.files import with_head
from tests.support.reference import log_probabilities


def test_the_figures_are_those_of_the_reference(tiny, tmp_path, anymamba):
    text = "To be, or not to be: été."
    (tmp_path / "a.txt").write_text(text)
    rows = log_probabilities(tiny, text)
    expected = -rows[np.arange(len(rows)), list(text.encode()[1:])].sum()
    figures = anymamba("score", tmp_path / "a.txt", "--model", tiny, "--json").json
    count = len(text.encode()) - 1
    assert figures["tokens"] == figures["bytes"] == count
    # A sum of float32 logits against float64: six digits.
    assert figures["nats"] == pytest.approx(expected, rel=1e-5)
    assert figures["nats_per_token"] == pytest.approx(expected / count, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(expected / count), rel=1e-4)
    assert figures["bits_per_byte"] == pytest.approx(expected / count / math.log(2), rel=1e-5)
    assert figures["weights"] == "f32"


def test_a_table_for_people(tiny, tmp_path, anymamba):
    (tmp_path / "a.txt").write_text("To be")
    facts = anymamba("score", tmp_path / "a.txt", "--model", tiny, "--json").json
    done = anymamba("score", tmp_path / "a.txt", "--model", tiny)
    lines = dict(line.split("  ", 1) for line in done.out.splitlines())
    assert lines["perplexity"].strip() == f"{facts['perplexity']:.4f}"
    assert done.err == ""


def test_the_bundled_model_knows_shakespeare(typed, anymamba):
    """Bits per byte of its kind of text are far from those of noise, which are 8 and more."""

    def bits(text):
        typed(text)
        return anymamba("score", "-", "--json").json["bits_per_byte"]

    assert bits(b"ROMEO:\nWhat is thy name, good lady?\n") < 3
    assert bits(bytes(range(128)) * 2) > 6


@pytest.mark.parametrize("text", ["", "a"])
def test_a_text_too_short_to_be_predicted(text, tmp_path, anymamba):
    (tmp_path / "a.txt").write_text(text)
    assert "too short" in anymamba("score", tmp_path / "a.txt").complaint


def test_a_file_that_is_not_there(tmp_path, anymamba):
    assert "nowhere" in anymamba("score", tmp_path / "nowhere").complaint


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("é", 1),
        ("\N{BYTE ORDER MARK}ROMEO:\n", 9),
        ("\N{GRINNING FACE}!", 4),
        ("\N{REPLACEMENT CHARACTER}a", 3),
        ("\N{REPLACEMENT CHARACTER}", 2),
    ],
)
def test_bytes_of_a_character_that_begins_before_the_first_prediction(
    text, count, tiny, tmp_path, anymamba
):
    """Each token is a byte here, so that all bytes but the first are predicted."""
    (tmp_path / "a.txt").write_bytes(text.encode())
    figures = anymamba("score", tmp_path / "a.txt", "--model", tiny, "--json").json
    assert figures["tokens"] == figures["bytes"] == count
    assert figures["bits_per_byte"] == pytest.approx(figures["bits_per_token"])
    assert f"{count} bytes" in anymamba("score", tmp_path / "a.txt", "--model", tiny).out


def test_a_loss_beyond_all_floats(tiny, tmp_path, anymamba):
    (tmp_path / "a.txt").write_text("To be")
    options = ("score", tmp_path / "a.txt", "--model")
    model = with_head(tiny, tmp_path / "model", lambda head: head * 1000)
    figures = anymamba(*options, model, "--json").json
    assert figures["perplexity"] is None
    assert figures["nats_per_token"] > 710
    assert anymamba(*options, model).out.startswith("perplexity      inf\n")
