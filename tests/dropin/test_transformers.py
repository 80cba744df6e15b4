"""Transformers' models give the same with the drop-in installed before their import as without."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support import processes
from tests.support.tolerance import assert_same, naming
from tests.support.warm import Warm

pytestmark = pytest.mark.slow

PROGRAM = str(Path(__file__).with_name("transformers_models.py"))
MODELS = ("Mamba", "Mamba2", "FalconMamba", "Jamba")
# What each model asks the two packages for, on its way through the test.
FUNCTIONS = {
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "mamba_chunk_scan_combined",
    "mamba_inner_fn",
    "mamba_split_conv1d_scan_combined",
    "selective_scan_fn",
    "selective_state_update",
}
FALLING_BACK = "is falling back to its reference PyTorch implementation"

Found = dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> dict[str, tuple[Found, str]]:
    """What all models give without the drop-in and with it, and what was logged meanwhile."""
    folder = tmp_path_factory.mktemp("transformers")
    done = {}
    # The drop-in comes before all imports.
    commands = {"without": [warm.python, PROGRAM], "with": [sys.executable, PROGRAM, "--dropin"]}
    for how, command in commands.items():
        file = folder / f"{how}.pt"
        process = processes.run(*command, file)
        assert process.returncode == 0, process.stderr
        done[how] = (torch.load(file), process.stderr)
    return done


def fell_back(log: str) -> set[str]:
    """The functions for which Transformers' own code ran, by its warnings."""
    return {line.split("`")[1] for line in log.splitlines() if FALLING_BACK in line}


def test_the_drop_in_serves_all_that_transformers_asks_for(
    runs: dict[str, tuple[Found, str]],
) -> None:
    assert fell_back(runs["without"][1]) >= FUNCTIONS
    assert fell_back(runs["with"][1]) == set()


@pytest.mark.parametrize("model", MODELS)
def test_outputs_and_gradients_are_the_same(model: str, runs: dict[str, tuple[Found, str]]) -> None:
    theirs, ours = (runs[how][0][model] for how in ("without", "with"))
    assert ours.keys() == theirs.keys()
    assert sum(name.startswith("gradient") for name in ours) > 30
    for name, expected in theirs.items():
        if name.startswith("tokens"):
            assert torch.equal(ours[name], expected), name
            continue
        # The design's tolerances for whole models and gradients, by the type of the weights.
        tolerance = 2e-2 if "bfloat16" in name else 1e-4
        with naming(name):
            assert_same(ours[name], expected, tolerance)


@pytest.mark.parametrize("model", MODELS)
def test_the_comparison_can_fail(model: str, runs: dict[str, tuple[Found, str]]) -> None:
    """Logits and gradients are large enough for the tolerance to mean something."""
    found = runs["without"][0][model]
    assert found["logits"].std() > 0.5
    assert found["logits of generation"].std() > 0.5
    gradients = [grad for name, grad in found.items() if name.startswith("gradient")]
    assert max(float(grad.abs().max()) for grad in gradients) > 1
