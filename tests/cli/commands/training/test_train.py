"""`anymamba train`, from a text to a model that `generate` takes."""

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

SMALL = """\
hidden_size: 16
layers: 1
window: 32
batch: 2
steps: 4
log_every: 2
evaluate_every: 2
save_every: 2
dtype: float32
threads: 1
plot: false
"""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("To be, or not to be: that is the question.\n" * 50)
    return path


def test_from_a_text_to_generated_text(text: Path, tmp_path: Path, anymamba: Any) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(SMALL)
    run = tmp_path / "run"
    given = ("train", "--config", str(config), "--data", str(text), "--output", str(run), "--json")
    done = anymamba(*given)
    assert done.status == 0, done.err
    told = json.loads(done.out)
    assert (told["steps"], told["stopped_by"]) == (4, None)
    assert told["validation_loss_windows"] < 6

    again = anymamba(*given)
    assert again.status == 2
    assert "has a run in it" in again.err
    assert again.err.count("\n") == 1

    more = anymamba("train", "--output", str(run), "--resume", "--steps", "6", "--json")
    assert json.loads(more.out)["steps"] == 6
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6]

    written = anymamba("generate", "To", "--model", str(run), "--max-new-tokens", "3", "--json")
    assert json.loads(written.out)["prompt"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--data", "none.txt", "--steps", "1"), "cannot read 'none.txt'"),
        (("--steps", "1"), "nothing to train on"),
        (("--data", "none.txt"), "no budget: give steps or minutes"),
        (("--batch", "many"), "batch must be a whole number of at least 1, got 'many'"),
        (("--config", "none.yaml"), "cannot read 'none.yaml'"),
        (("--resume",), "nothing to go on with"),
    ],
)
def test_mistakes_are_one_line(
    given: tuple[str, ...], words: str, tmp_path: Path, anymamba: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    done = anymamba("train", *given)
    assert done.status == 2
    assert words in done.err
    assert done.err.count("\n") == 1
