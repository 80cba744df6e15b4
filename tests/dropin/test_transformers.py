"""Transformers' models give the same with the drop-in installed before their import as without."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.dropin.transformers_models import NEW_TOKENS
from tests.support import processes
from tests.support.tolerance import assert_same, naming
from tests.support.warm import Warm

pytestmark = pytest.mark.slow

PROGRAM = str(Path(__file__).with_name("transformers_models.py"))
# How many of a model's layers have a state space.
MAMBA = {"Mamba": 2, "FalconMamba": 2, "Jamba": 2}
MAMBA_2 = {
    "Mamba2": 2,
    "Bamba": 2,
    "Zamba2": 3,
    "NemotronH": 2,
    "GraniteMoeHybrid": 2,
    "FalconH1": 2,
    "FalconH1 with norms": 2,
}
MODELS = (*MAMBA, *MAMBA_2)
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
    results = [name for name in ours if "bfloat16" not in name and "calls" not in name]
    assert set(results) == {name for name in theirs if "bfloat16" not in name}
    assert sum(name.startswith("gradient") for name in results) > 30
    for name in results:
        if name.startswith("tokens"):
            assert torch.equal(ours[name], theirs[name]), name
            continue
        # The design's tolerance for whole models and gradients.
        with naming(name):
            assert_same(ours[name], theirs[name], 1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_bfloat16_is_as_close_to_float32(model: str, runs: dict[str, tuple[Found, str]]) -> None:
    """Beside attention, experts and scaled products, 16 bits make Transformers' own logits off by
    up to 10 % of the largest; ours are off by no more, to within a quarter of chance."""
    errors = []
    for how in ("with", "without"):
        found = runs[how][0][model]
        difference = found["logits in bfloat16"].float() - found["logits of the same weights"]
        errors.append(float(difference.square().mean().sqrt()))
    ours, theirs = errors
    assert 0 < ours < 1.25 * theirs


@pytest.mark.parametrize("model", MODELS)
def test_the_native_kernels_did_the_work(model: str, runs: dict[str, tuple[Found, str]]) -> None:
    """Counted in the core: once a layer for a prompt, a step and each direction of training."""
    calls = {name: n for name, n in runs["with"][0][model].items() if name.startswith("calls")}
    operator, layers = ("ssd", MAMBA_2[model]) if model in MAMBA_2 else ("scan", MAMBA[model])
    steps = layers * (NEW_TOKENS - 1)  # the prompt gives the first
    expected = {
        ("prefill", operator): layers,
        ("prefill", "conv"): layers,
        ("generation", operator): layers,
        ("generation", "conv"): layers,
        ("generation", "step"): steps,
        ("training", operator): layers,
        ("training", f"{operator}_backward"): layers,
        ("training", "conv"): layers,
        ("training", "conv_backward"): layers,
    }
    assert calls == {f"calls in {what} of {name}": n for (what, name), n in expected.items()}
    assert not any(name.startswith("calls") for name in runs["without"][0][model])


@pytest.mark.parametrize("model", MODELS)
def test_the_comparison_can_fail(model: str, runs: dict[str, tuple[Found, str]]) -> None:
    """Logits and gradients are large enough for the tolerance to mean something."""
    found = runs["without"][0][model]
    assert found["logits"].std() > 0.5
    assert found["logits of generation"].std() > 0.5
    gradients = [grad for name, grad in found.items() if name.startswith("gradient")]
    assert max(float(grad.abs().max()) for grad in gradients) > 1
