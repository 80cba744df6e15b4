"""Training on a GPU: the CPU's losses in float32, and everything that is done to models there."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from anymamba import MambaForCausalLM, load_causal_lm
from anymamba.modeling.adapters import patch_peft
from anymamba.training.distributed import sequence_loss, sequence_parallel, shard
from anymamba.training.lifecycle import read_metrics
from anymamba.training.pretrain.run import train as pretrain
from tests.modeling.test_devices import model_of
from tests.parity.architectures import ARCHITECTURES
from tests.support.models import talkative_model, words
from tests.support.tolerance import assert_same, naming
from tests.support.training import small

pytestmark = pytest.mark.slow


@pytest.fixture
def process_group(device: torch.device, tmp_path: Path) -> Iterator[None]:
    """A group of this process alone."""
    meeting = dist.FileStore(str(tmp_path / "meeting"), 1)
    kind = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(kind, store=meeting, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def train(model: nn.Module, device: torch.device, steps: int = 4) -> list[float]:
    """The losses of a few steps of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        ids = words(4, 33, seed=step).to(device)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def as_is(model: MambaForCausalLM, device: torch.device) -> nn.Module:
    return model


def checkpointed(model: MambaForCausalLM, device: torch.device) -> nn.Module:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def compiled(model: MambaForCausalLM, device: torch.device) -> nn.Module:
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    wrapped: nn.Module = torch.compile(model, backend=backend)  # type: ignore[assignment]
    return wrapped


def with_ddp(model: MambaForCausalLM, device: torch.device) -> nn.Module:
    return DistributedDataParallel(model, [device] if device.type == "cuda" else None)


def with_fsdp(model: MambaForCausalLM, device: torch.device) -> nn.Module:
    return shard(model)


WRAPPED: list[Callable[[MambaForCausalLM, torch.device], nn.Module]]
WRAPPED = [as_is, checkpointed, compiled, with_ddp, with_fsdp]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("wrap", WRAPPED, ids=lambda wrap: wrap.__name__)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_losses_are_the_cpu_s(
    name: str, wrap: Callable[..., nn.Module], device: torch.device, process_group: None
) -> None:
    model = model_of(name).train()
    expected = train(copy.deepcopy(model), torch.device("cpu"))
    found = train(wrap(model.to(device), device), device)
    # Adam divides by the size of a gradient, which brings out the rounding of small ones.
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_autocast(name: str, dtype: torch.dtype, device: torch.device) -> None:
    model = model_of(name).train().to(device)
    ids = words(2, 33).to(device)
    model(ids, labels=ids).loss.backward()
    expected = {weight: p.grad.clone() for weight, p in model.named_parameters()}
    model.zero_grad()
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16, init_scale=256.0)
    with torch.autocast(device.type, dtype):
        loss = model(ids, labels=ids).loss
    scaler.scale(loss).backward()
    for weight, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        found = parameter.grad / scaler.get_scale()
        with naming(weight):
            # Products of 8 bits, through two layers and back.
            largest = float(expected[weight].abs().max())
            assert_same((found / largest).cpu(), (expected[weight] / largest).cpu(), 0.15)


def test_a_sequence_shared_by_processes(device: torch.device, process_group: None) -> None:
    model = talkative_model().train().to(device)
    ids = words(2, 20).to(device)
    expected = model(ids, labels=ids).loss.detach()
    with sequence_parallel(model):
        loss = sequence_loss(model, ids)
        loss.backward()
    assert_same(loss.detach().cpu(), expected.cpu())


def losses_of(folder: Path) -> list[float]:
    return [
        line["loss"] for line in read_metrics(folder / "run" / "metrics.jsonl") if "loss" in line
    ]


@pytest.mark.parametrize("order", ["shuffled", "carried"])
def test_pretraining(order: str, tmp_path: Path, device: torch.device) -> None:
    for name in ("cpu", "whole", "parts"):
        (tmp_path / name).mkdir()
    # A rate that does not look ahead to the end of the run.
    settings: dict[str, Any] = {"order": order, "schedule": "constant", "warm_up": 0.0}
    pretrain(small(tmp_path / "cpu", **settings))
    settings["device"] = device.type
    whole = small(tmp_path / "whole", sample_prompt="1", sample_tokens=4, **settings)
    pretrain(whole)
    assert losses_of(tmp_path / "whole") == pytest.approx(losses_of(tmp_path / "cpu"), rel=2e-3)
    pretrain(small(tmp_path / "parts", **settings, steps=5))
    pretrain(small(tmp_path / "parts", **settings), resume=True)
    assert losses_of(tmp_path / "parts")[5:] == losses_of(tmp_path / "whole")[5:]


def test_fine_tuning(tmp_path: Path, device: torch.device) -> None:
    pytest.importorskip("trl")
    from anymamba.assets import bundled_model
    from anymamba.training.finetune import FinetuneSettings, finetune

    file = tmp_path / "sums.jsonl"
    file.write_text('{"prompt": "1+1=", "completion": "2"}\n' * 8, encoding="utf-8")
    settings = FinetuneSettings(rank=2, max_steps=4, batch_size=4, learning_rate=1e-2)
    figures = finetune([str(file)], tmp_path / "adapter", settings=settings)
    assert figures["loss_last"] < figures["loss_first"]
    undo = patch_peft()
    adapted: Any = load_causal_lm(tmp_path / "adapter")
    undo()
    plain = load_causal_lm(bundled_model())
    ids: Tensor = words(1, 5)
    with torch.no_grad():
        found = adapted.to(device)(ids.to(device)).logits.cpu()
        assert not torch.allclose(found, plain(ids).logits)
