"""Sequence parallelism with two and four processes against one process with the whole sequence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from anymamba.errors import InputError
from anymamba.training.distributed import chunk_of, sequence_parallel
from tests.support.tolerance import assert_same, naming
from tests.training.distributed import work
from tests.training.distributed.launching import launch

pytestmark = pytest.mark.slow

LENGTH = 41  # no multiple: the first chunks are one longer


MAMBA2 = {"architecture": "mamba2", "num_heads": 4, "head_dim": 6, "n_groups": 2, "chunk_size": 4}


def alone(changes: dict[str, Any], holes: bool) -> tuple[float, dict[str, Any], Any]:
    """Through the model's own loss."""
    torch.set_num_threads(1)
    model = work.small_model(**changes)
    ids = work.batch(0, 2, LENGTH)
    labels = ids.clone()
    if holes:
        labels[0, 3:6] = -100
    output = model(ids, labels=labels)
    output.loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    return output.loss.item(), gradients, output.logits.detach()


def same(found: Any, expected: Any) -> None:
    """Models and gradients: 1e-4 of the largest value or of 1, as CONTRIBUTING.md says."""
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        with naming(name):
            assert_same(found[1][name], gradient)
        # Small gradients too: the bound above says nothing where they are all below it.
        difference = (found[1][name] - gradient).norm() / gradient.norm()
        assert difference < 1e-3, name


@pytest.mark.parametrize(
    ("processes", "changes"),
    [
        (2, {}),
        (4, {}),
        (2, {"use_conv_bias": False, "use_bias": True, "hidden_act": "gelu", "conv_kernel": 3}),
        (2, {"architecture": "falcon_mamba", "mixer_rms_eps": 0.3}),
        (3, MAMBA2 | {"time_step_limit": (0.02, 0.2)}),  # of two, no state passes through one
        (2, MAMBA2 | {"use_gated_norm": False}),
    ],
)
def test_loss_gradients_and_logits(processes: int, changes: dict[str, Any], tmp_path: Path) -> None:
    expected = alone(changes, holes=True)
    found = launch(work.gradients_along_the_sequence, processes, tmp_path / "run", LENGTH, changes)
    for one in found:
        same(one, expected)
    logits = torch.cat([one[2] for one in found], dim=1)
    assert_same(logits, expected[2])


@pytest.mark.parametrize(
    "run", [work.checkpointed_along_the_sequence, work.sharded_along_the_sequence]
)
def test_with_gradient_checkpointing_and_with_fsdp(run: Callable[..., Any], tmp_path: Path) -> None:
    expected = alone({}, holes=False)
    for found in launch(run, 2, tmp_path / "run", LENGTH):
        same(found, expected)


def test_mistakes_are_named(tmp_path: Path) -> None:
    for found in launch(work.mistakes_along_the_sequence, 2, tmp_path / "run"):
        short, labels, cache, mask, twice, why, after = found
        assert "a chunk of 2 positions is shorter than the convolution's 4" in short
        assert "labels has shape (1, 5)" in labels
        assert "use_cache=False" in cache
        assert "whole rows only" in mask
        assert "parallel already" in twice
        assert why == "layers.0.mixer: replaced by _SequenceParallelMixer"
        assert after == "None"


def test_without_a_process_group_it_says_what_to_do() -> None:
    with (
        pytest.raises(InputError, match="start the program with torchrun"),
        sequence_parallel(work.small_model()),
    ):
        pass
    with pytest.raises(InputError, match="start the program with torchrun"):
        chunk_of(work.batch(0))
