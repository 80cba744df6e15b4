"""DDP and FSDP2 with two processes against one process on the same global batch."""

from pathlib import Path
from typing import Any

import pytest
import torch

from anymamba.errors import InputError
from anymamba.training.distributed import shard
from tests.training.distributed import work
from tests.training.distributed.launching import launch

pytestmark = pytest.mark.slow

# Sums over rows in another order differ by float32's rounding, which AdamW's first steps, of one
# size whatever the gradient's, can magnify where a gradient is next to nothing.
LOSSES, WEIGHTS = 1e-5, 1e-4


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return launch(work.with_fsdp, 2, tmp_path_factory.mktemp("sharded") / "run")


def same(found: Any, alone: Any) -> None:
    losses, weights = found[:2]
    assert losses == pytest.approx(alone[0], abs=LOSSES)
    assert weights.keys() == alone[1].keys()
    for name, expected in alone[1].items():
        torch.testing.assert_close(weights[name], expected, rtol=0, atol=WEIGHTS, msg=name)


def test_ddp_trains_as_one_process(alone: Any, tmp_path: Path) -> None:
    for found in launch(work.with_ddp, 2, tmp_path / "run"):
        same(found, alone)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fsdp_trains_as_one_process(
    checkpointing: bool, alone: Any, sharded: Any, tmp_path: Path
) -> None:
    found = launch(work.with_fsdp, 2, tmp_path / "run", True) if checkpointing else sharded
    for one in found:
        same(one, alone)
    total = sum(weight.numel() for weight in alone[1].values())
    held = [facts["held"] for *_, facts in found]
    assert sum(held) == total
    assert max(held) < 0.6 * total


def test_the_fused_step_is_off_with_sharded_weights(alone: Any, sharded: Any) -> None:
    model = work.small_model().eval()
    model.load_state_dict(alone[1], strict=False)
    with torch.no_grad():
        expected = model(work.batch(0)).logits
    for *_, facts in sharded:
        # Which weights are whole at the moment decides which part is named.
        assert facts["why"] is not None
        assert "DTensor" in facts["why"] or "FSDPMamba" in facts["why"]
        torch.testing.assert_close(facts["read"], expected, rtol=1e-3, atol=1e-3)


def test_the_recurrence_stays_in_float32(alone: Any, tmp_path: Path) -> None:
    for losses, seen in launch(work.with_fsdp_in_bfloat16, 2, tmp_path / "run"):
        # bfloat16's products: 2e-2, as CONTRIBUTING.md says.
        assert losses == pytest.approx(alone[0], rel=2e-2)
        assert losses != pytest.approx(alone[0], abs=LOSSES)
        for name in ("A_log", "D", "dt_proj.bias", "dt_proj.weight", "conv1d.weight"):
            assert seen[name] == torch.float32, name
        for name in ("in_proj.weight", "x_proj.weight", "out_proj.weight"):
            assert seen[name] == torch.bfloat16, name


@pytest.mark.parametrize("architecture", ["mamba", "mamba2"])
def test_a_model_may_be_born_sharded(architecture: str, tmp_path: Path) -> None:
    """From the meta device: all processes have the weights of one model, as a model begins."""
    sizes: dict[str, Any] = {"num_hidden_layers": 1}
    if architecture == "mamba2":
        sizes |= {"num_heads": 4, "head_dim": 6, "n_groups": 1, "chunk_size": 8}
    found = launch(work.born_sharded, 2, tmp_path / "run", architecture, sizes)
    one = found[0]["whole"]
    assert all(torch.isfinite(weight).all() for weight in one.values())
    drawn, others = (each["drawn"] for each in found)
    assert drawn.keys() == others.keys()
    assert any(not torch.equal(drawn[name], others[name]) for name in drawn)
    for name, values in drawn.items():
        for each, part in zip(found, values.chunk(2), strict=True):
            assert torch.equal(each["parts"][name], part), name
    prefix = "backbone.layers.0.mixer."
    rates = one[f"{prefix}A_log"].exp()
    if architecture == "mamba":
        assert torch.allclose(rates, torch.arange(1.0, 17).expand(24, 16))
    else:
        assert bool((rates >= 1).all() and (rates <= 16).all())
    bias = one[f"{prefix}dt_proj.bias" if architecture == "mamba" else f"{prefix}dt_bias"]
    steps = torch.nn.functional.softplus(bias)
    assert bool((steps > 0.0009).all() and (steps < 0.11).all())


def test_without_a_process_group_it_says_what_to_do() -> None:
    with pytest.raises(InputError, match="start the program with torchrun"):
        shard(work.small_model())
