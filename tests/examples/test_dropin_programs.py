"""The examples that import `mamba_ssm`: short runs, what they ask, and the data they draw."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import anymamba.dropin
from tests.support import processes
from tests.support.warm import Warm

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("vision", "dna", "forecast")
Load = Callable[[str], ModuleType]


@pytest.fixture
def load() -> Iterator[Load]:
    """An example as a module, whose imports the drop-in answers."""

    def load_it(name: str) -> ModuleType:
        return processes.module_from(EXAMPLES / name / "train.py", f"example_{name}")

    before = set(sys.modules)
    anymamba.dropin.install()
    torch.manual_seed(0)
    yield load_it
    anymamba.dropin.uninstall()
    for name in set(sys.modules) - before:
        if name.startswith(("mamba_ssm", "causal_conv1d", "example_")):
            del sys.modules[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_short_run_ends_well(name: str, warm: Warm) -> None:
    script = str(EXAMPLES / name / "train.py")
    done = processes.run(warm.python, "-m", "anymamba", "run", script, "--quick")
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[3]) for line in done.stdout.splitlines() if "loss" in line]
    assert len(losses) == 2
    assert "asked" in done.stdout


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [[], ["--quick"]])
def test_without_training_it_ends_with_an_error(
    name: str, options: list[str], load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load(name)
    monkeypatch.setattr(module, "train", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["train.py", *options])
    with pytest.raises(AssertionError, match=r"it has not learned|it does not beat"):
        module.main()


def test_the_shapes_differ_and_are_drawn_under_their_names(load: Load) -> None:
    vision = load("vision")
    # The centre; beside it; above it at the edge; a corner of the square.
    x, y = torch.tensor([0.0, 0.5, 0.0, 0.8]), torch.tensor([0.0, 0.0, -0.95, 0.8])
    found = [mask.tolist() for mask in vision.inside(x, y)]
    expected = {
        "disc": [True, True, True, False],
        "ring": [False, False, True, False],
        "square": [True, True, False, True],
        "diamond": [True, True, True, False],
        "plus": [True, True, True, False],
        "cross": [True, False, False, True],
    }
    assert dict(zip(vision.SHAPES, found, strict=True)) == expected
    images, labels = vision.draw(300, torch.device("cpu"))
    assert images.shape == (300, 3, vision.SIZE, vision.SIZE)
    assert set(labels.tolist()) == set(range(len(vision.SHAPES)))
    # A square fills most of what it spans, and a ring the least but for the thin shapes.
    filled = (images.mean(dim=1) > -0.2).flatten(1).float().mean(dim=1)
    shares = [float(filled[labels == i].mean()) for i in range(len(vision.SHAPES))]
    assert shares[0] > shares[1]
    assert shares[2] > shares[4]


def test_the_other_strand_of_a_sequence(load: Load) -> None:
    dna = load("dna")
    bases = torch.tensor([["ACGT".index(base) for base in "AACGTC"]])
    other = dna.reverse_complement(bases)[0].tolist()
    assert "".join("ACGT"[base] for base in other) == "GACGTT"
    hidden = torch.tensor([[dna.HIDDEN, 0]])
    assert dna.reverse_complement(hidden).tolist() == [[3, dna.HIDDEN]]


def test_motifs_stand_where_they_are_said_to(load: Load) -> None:
    dna = load("dna")
    genome = dna.Genome(torch.device("cpu"))
    bases, is_motif = genome.draw(20)
    allowed = {tuple(motif) for motif in genome.motifs.tolist()}
    allowed |= {tuple(motif) for motif in dna.reverse_complement(genome.motifs).tolist()}
    for row, mask in zip(bases, is_motif, strict=True):
        assert int(mask.sum()) == 5 * dna.MOTIF_LENGTH
        for motif in row[mask].view(-1, dna.MOTIF_LENGTH).tolist():
            assert tuple(motif) in allowed


def test_the_noise_of_series_has_the_memory_it_should(load: Load) -> None:
    forecast = load("forecast")
    past, future = forecast.draw(200, torch.device("cpu"))
    assert past.shape == (200, forecast.PAST)
    assert future.shape == (200, forecast.FUTURE)
    noise = forecast.noise(200, torch.device("cpu"))
    assert float(noise.std()) == pytest.approx(1, abs=0.05)
    of_neighbours = float((noise[:, 1:] * noise[:, :-1]).mean())
    assert of_neighbours == pytest.approx(0.7, abs=0.05)
