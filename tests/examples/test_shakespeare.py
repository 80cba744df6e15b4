"""The bundled model's recipe: it trains, the check measures what it says, the card tells of it."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from tests.support import processes
from tests.support.warm import Warm

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "shakespeare"
CHECK = EXAMPLE / "check.py"
LINE = b"The quick brown fox jumps over the lazy dog. "
# What makes the recipe a matter of seconds.
SMALL = {
    "layers": 1,
    "hidden-size": 16,
    "state-size": 4,
    "batch": 4,
    "steps": 30,
    "evaluate-every": 10,
    "save-every": 30,
    "learning-rate": 0.02,
    "sample-prompt": "The",
}


@pytest.fixture(scope="module", params=["recipe", "short"])
def trained(
    request: pytest.FixtureRequest, warm: Warm, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a model that one of the recipes trained, made small; fox.txt stands beside."""
    folder = tmp_path_factory.mktemp("fox")
    (folder / "fox.txt").write_bytes(LINE * 120)
    options = [f"--{name}={value}" for name, value in SMALL.items()]
    train = ["-m", "anymamba", "train", "--config", EXAMPLE / f"{request.param}.yaml"]
    places = ["--data", folder / "fox.txt", "--output", folder / "model"]
    done = processes.run(warm.python, *train, *options, *places)
    assert done.returncode == 0, done.stderr
    return folder / "model"


@pytest.fixture(scope="module")
def text(trained: Path) -> str:
    return str(trained.with_name("fox.txt"))


@pytest.fixture
def scripts() -> Iterator[None]:
    """The example's files can be imported during a test only."""
    sys.path.insert(0, str(EXAMPLE))
    yield
    sys.path.remove(str(EXAMPLE))
    for name in ("check", "model_card"):
        sys.modules.pop(name, None)


def test_the_check_agrees_with_the_trainer(trained: Path, text: str, warm: Warm) -> None:
    done = processes.run(warm.python, CHECK, trained, "--data", text)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("agrees")


def test_the_check_measures_the_last_tenth(trained: Path, text: str, warm: Warm) -> None:
    printed = processes.run(warm.python, CHECK, trained, "--data", text).stdout.splitlines()
    model = transformers.MambaForCausalLM.from_pretrained(trained, dtype=torch.float32)
    data = torch.tensor(list(LINE * 120))
    held_out = data[int(0.9 * len(data)) :]
    windows = [held_out[start : start + 257] for start in (0, 256)]  # 27 bytes are left
    with torch.no_grad():
        loss = sum(
            torch.nn.functional.cross_entropy(model(row[None, :-1]).logits[0], row[1:])
            for row in windows
        )
    assert f"{float(loss) / 2:.4f}" in printed[1]
    assert "540 bytes" in printed[1]


def test_the_check_finds_other_losses_than_the_noted(trained: Path, text: str, warm: Warm) -> None:
    file = trained / "training.json"
    content = file.read_text()
    noted = json.loads(content)
    noted["result"]["validation_loss_windows"] += 0.001
    try:
        file.write_text(json.dumps(noted))
        done = processes.run(warm.python, CHECK, trained, "--data", text)
    finally:
        file.write_text(content)
    assert done.returncode == 1
    assert "DIFFERS" in done.stdout


def test_the_card_has_the_losses_and_samples(trained: Path, text: str, warm: Warm) -> None:
    about = ["--data", text, "--machine", "a toy"]
    done = processes.run(warm.python, EXAMPLE / "model_card.py", trained, *about)
    assert done.returncode == 0, done.stderr
    card = (trained / "README.md").read_text()
    result = json.loads((trained / "training.json").read_text())["result"]
    for name in ("validation_loss_windows", "validation_loss_stream"):
        assert f"{result[name]:.4f}" in card
    assert "ROMEO:" in card
    assert "a toy" in card


@pytest.mark.usefixtures("scripts")
def test_the_text_is_split_at_nine_tenths(tmp_path: Path) -> None:
    from check import split  # type: ignore[import-not-found]

    (tmp_path / "text").write_bytes(bytes(range(256)))
    training, validation = split(tmp_path / "text")
    assert training.tolist() == list(range(230))
    assert validation.tolist() == list(range(230, 256))
