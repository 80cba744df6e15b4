"""The paper's synthetic tasks: short runs, the data they draw, and the report beside its files."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.support import processes
from tests.support.warm import Warm

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    return processes.module_from(EXAMPLES / f"{name}.py", f"example_{name.replace('/', '_')}")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """The scripts' neighbours can be imported during a test only; random numbers are the same."""
    paths, modules = list(sys.path), set(sys.modules)
    torch.manual_seed(0)
    yield
    sys.path[:] = paths
    for name in set(sys.modules) - modules:
        if name.startswith(("example_", "synthetic_")):
            del sys.modules[name]


def quick(warm: Warm, name: str, output: Path) -> dict[str, Any]:
    """What a short run writes."""
    script = str(EXAMPLES / name / "train.py")
    done = processes.run(warm.python, script, "--quick", "--output", output)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    assert result["quick"]
    return result


def test_induction_is_learned_in_seconds_and_holds_beyond_its_lengths(
    warm: Warm, tmp_path: Path
) -> None:
    result = quick(warm, "induction_heads", tmp_path / "result.json")
    scores = {score["length"]: score["accuracy"] for score in result["scores"]}
    assert max(result["training_lengths"]) == 64
    assert scores[64] > 0.9  # a guess: 0.067
    assert scores[256] > 0.5


def test_selection_is_what_copies(warm: Warm, tmp_path: Path) -> None:
    models = quick(warm, "selective_copying", tmp_path / "result.json")["models"]
    with_it, without = (
        models[name]["score"]["accuracy"] for name in ("selective", "time-invariant")
    )
    assert with_it > without + 0.2  # a guess: 0.071


@pytest.mark.parametrize("length", [4, 5, 32, 33])
@pytest.mark.parametrize("most", [1, 4])
def test_induction_sequences_follow_the_rule(length: int, most: int) -> None:
    module = load("induction_heads/train")
    batch = module.draw(200, length, most)
    answers = iter(batch.answers.tolist())
    for row, asked in zip(batch.tokens.tolist(), batch.asked.tolist(), strict=True):
        places = [place for place, token in enumerate(row) if token == module.TRIGGER]
        assert 2 <= len(places) <= most + 1
        assert places[-1] == length - 1
        values = {row[place + 1] for place in places[:-1]}
        assert len(values) == 1
        assert [place for place, is_asked in enumerate(asked) if is_asked] == places[1:]
        for _ in places[1:]:
            assert next(answers) in values
    assert next(answers, None) is None


def test_first_triggers_stand_anywhere() -> None:
    module = load("induction_heads/train")
    tokens = module.draw(2000, 12, 1).tokens
    both = torch.cat([tokens, module.draw(2000, 12, 1).tokens])
    first = (both == module.TRIGGER).int().argmax(1)
    assert set(first.tolist()) <= set(range(10))
    assert len(set(first.tolist())) >= 5


def test_the_test_asks_what_a_single_pass_would(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("induction_heads/train")
    model = module.small_model().eval()
    monkeypatch.setattr(module, "PIECE", 50)
    pieces: list[torch.Tensor] = []
    answers: list[torch.Tensor] = []

    def recorded(tokens: torch.Tensor, **options: Any) -> Any:
        output = model(tokens, **options)
        if (tokens == module.TRIGGER).all():
            answers.append(output.logits[:, -1])
        else:
            pieces.append(tokens)
        return output

    recorded.config = model.config  # type: ignore[attr-defined]
    scores = list(module.tested(recorded, 3, 128, 256))
    read = torch.cat(pieces, 1)
    for score, logits in zip(scores, answers, strict=True):
        length = score["length"]
        trigger = torch.full((3, 1), module.TRIGGER)
        with torch.no_grad():
            whole = model(torch.cat([read[:, : length - 1], trigger], 1)).logits[:, -1]
        # 1e-4: a whole model in float32, cut anywhere.
        torch.testing.assert_close(logits, whole, atol=1e-4 * float(whole.abs().max()), rtol=0)
        assert ((read[:, : length - 1] == module.TRIGGER).sum(1) == 1).all()
    assert [score["length"] for score in scores] == [128, 256]


def test_copying_sequences_follow_the_rule() -> None:
    module = load("selective_copying/train")
    batch = module.draw(100, module.Task(remembered=3, scattered_over=9))
    assert batch.tokens.shape == (100, 12)
    answers = batch.answers.view(100, 3).tolist()
    for row, expected in zip(batch.tokens.tolist(), answers, strict=True):
        assert [token for token in row[:9] if token != module.NOISE] == expected
        assert row[9:] == [module.MARKER] * 3
    assert batch.asked[:, 9:].all()
    assert not batch.asked[:, :9].any()


def test_without_selection_the_state_space_model_is_linear_in_its_input() -> None:
    """With Delta, B and C constant, the scan of a sum is the sum of the scans."""
    module = load("selective_copying/train")
    mixer = module.without_selection(module.small_model()).backbone.layers[0].mixer

    def scanned(x_ble: torch.Tensor) -> torch.Tensor:
        delta, B, C = mixer.x_proj(x_ble).split([mixer.time_step_rank, 16, 16], dim=-1)
        delta, bias = delta @ mixer.dt_proj.weight.T, mixer.dt_proj.bias
        inputs = (x_ble, delta, mixer._A(), B, C, mixer.D, torch.ones_like(x_ble), bias)
        y: torch.Tensor = mixer._scan(inputs, None, None)
        return y

    one, other = torch.randn(2, 2, 9, 128)
    # 1e-5: what an operator may differ by in float32, times the largest value.
    scale = float(scanned(one + other).detach().abs().max())
    torch.testing.assert_close(
        scanned(one + other), scanned(one) + scanned(other), atol=1e-5 * max(1, scale), rtol=0
    )


def test_page_and_result_files_agree() -> None:
    report = load("synthetic_report")
    page = report.PAGE.read_text(encoding="utf-8")
    assert report.fill(page) == page
    assert page.count("<!-- figures: ") == len(report.BLOCKS)


def test_a_page_with_another_figure_is_noticed() -> None:
    report = load("synthetic_report")
    page = report.PAGE.read_text(encoding="utf-8")
    number = page.index("64 of 64")
    assert report.fill(page[:number] + "9" + page[number:]) == page


def test_published_results_are_of_full_runs() -> None:
    report = load("synthetic_report")
    for path in (*report.INDUCTION.glob("*.json"), report.COPYING):
        assert not report.read(path)["quick"]
